//! From a problem and a device's powers to kernels, pure: so that the choice is tested for devices that
//! nobody here owns.

mod candidate;
mod coop;
mod launch;
mod routes;

use std::sync::Arc;

use super::problem::{Params, Problem};
use crate::gpu::{Caps, DType, Shader};
use crate::{Error, Result};
pub use candidate::{Candidate, Subgroups};
use coop::Coop;
use launch::Planner;

/// A way to compute attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// `scores`, `softmax`, `values`: three passes over a `[B, H, Q, K]` matrix, which they also give.
    ThreePass,
    /// One fused kernel for many query rows.
    Prefill,
    /// One fused kernel for few query rows, the key axis in parts.
    Decode,
}

impl Route {
    /// All of them.
    pub const ALL: [Route; 3] = [Route::ThreePass, Route::Prefill, Route::Decode];
}

/// One launch of a plan.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's variant.
    pub shader: Shader,
    /// What it binds behind its parameters, in order: names, and the bytes of the tensor that it sees, all
    /// of its own if not given.
    pub(crate) bindings: Vec<(Arc<str>, Option<[u64; 2]>)>,
    pub(crate) params: Params,
    /// Workgroups.
    pub groups: u64,
}

/// What will run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The route taken; of ragged sequences that of the long ones.
    pub route: Route,
    /// What was chosen: the kernel and its sizes.
    pub candidate: Candidate,
    /// Where ragged sequences of few queries go to a kernel of their own: the most queries, and what was chosen.
    pub short: Option<(u32, Candidate)>,
    /// Whether a measurement on the device chose it, rather than the table by capabilities.
    pub tuned: bool,
    /// The kernels, in order.
    pub launches: Vec<Launch>,
    /// Parts of the key axis; of ragged sequences that of the short ones.
    pub splits: u32,
    /// Keys in each part.
    pub split_len: u32,
    /// 32-bit words of scratch, which the caller may lend.
    pub scratch: u64,
}

/// Query rows of one KV head's group that are few; half as many on a processor.
const FEW_ROWS: u32 = 16;
/// Keys below which the key axis is not split.
const SPLIT_AT_LEAST: u32 = 512;
/// Keys of each part where a row's result may not depend on its neighbours.
const INVARIANT_SPLIT: u32 = 1024;
/// Workgroups that keep a large device busy, and a processor, where each part costs as much as it brings.
const ENOUGH_GROUPS: [u64; 2] = [256, 8];
/// Threads of the kernels whose threads are numbered through.
const THREADS: u64 = 64;
/// Multiply-adds of one launch: a tenth of a second or so on a small device, well below any watchdog.
const WORK: u64 = 1 << 36;
/// Turns of all its loops that a thread may take on a processor: Mesa's software driver before 25 ends
/// every loop, without a word, once a thread has taken 65,535.
const TURNS: u64 = 60_000;
/// Workgroup memory of every device.
const WORKGROUP_MEMORY: u32 = 16_384;

/// Chooses the kernels for a problem by a table of capabilities.
///
/// # Errors
/// [`Error::Refused`] where the device cannot honour the problem, or the forced route cannot.
pub fn plan(problem: &Problem, caps: &Caps) -> Result<Plan> {
    plan_with(problem, caps, None)
}

/// [`plan`] with what was measured to be the best, which is taken where the problem leaves the choice free
/// (it has a [`Problem::bucket`]) and the candidate [`fits`](Candidate::fits) it; [`Plan::tuned`] tells.
///
/// # Errors
/// As [`plan`].
pub fn plan_with(problem: &Problem, caps: &Caps, tuned: Option<Candidate>) -> Result<Plan> {
    if problem.options.f16_math && !caps.f16 {
        return Err(Error::refused(
            "f16_math",
            true,
            "false: this device has no f16 in shaders",
        ));
    }
    if problem.options.f16_math && !caps.f16_math {
        return Err(Error::refused(
            "f16_math",
            true,
            "false: products in f16 gave wrong answers on this device (`qkv doctor` looks again)",
        ));
    }
    let f16 = problem.types.contains(&DType::F16) || problem.bias_type == Some(DType::F16);
    if f16 && !caps.f16 {
        return Err(Error::refused(
            "the storage type",
            "f16",
            "f32 or bf16: this device has no f16 in shaders",
        ));
    }
    if caps.software && problem.ragged_q && problem.batch as u64 > TURNS / 2 {
        return Err(Error::refused(
            "cu_q",
            format_args!("{} sequences", problem.batch),
            format!("at most {}: this driver cuts longer loops", TURNS / 2),
        ));
    }
    let free = tuned.filter(|candidate| problem.is_tunable() && candidate.fits(problem, caps));
    if let Some(Ok(Ok(mut plan))) = free.map(|candidate| lay_out(problem, caps, candidate)) {
        plan.tuned = true;
        return Ok(plan);
    }
    let options = &problem.options;
    let table = Candidate::by_table(problem, caps)?;
    if let Some(plan) = by_length(problem, caps, table) {
        return Ok(plan);
    }
    let launch = match lay_out(problem, caps, table)? {
        Ok(plan) => return Ok(plan),
        Err(launch) => launch,
    };
    // Each of the three passes binds a part of what a fused kernel does.
    if options.route.is_none()
        && options.splits.is_none()
        && !options.f16_math
        && let Ok(Ok(passes)) = lay_out(problem, caps, Candidate::three_pass())
    {
        return Ok(passes);
    }
    let names: Vec<&str> = launch.bindings.iter().map(|(name, _)| &**name).collect();
    Err(Error::refused(
        "the tensors of these options together",
        names.join(", "),
        format!("this device binds {} at once", caps.storage_buffers),
    ))
}

/// Where ragged sequences go to `prefill`, those of few queries to `decode` instead, which wastes less on them and
/// splits their keys; none where nothing is free to choose or one of both cannot be laid out.
fn by_length(problem: &Problem, caps: &Caps, table: Candidate) -> Option<Plan> {
    let options = &problem.options;
    let free = options.route.is_none() && !options.f16_math;
    if !(free && problem.ragged_q && problem.batch > 1 && table.route == Route::Prefill) {
        return None;
    }
    let few = (few_rows(caps) / (problem.heads() / problem.kv_heads())).max(1);
    let [short, long] = [[0, few], [few + 1, u32::MAX]].map(|queries| Problem {
        queries,
        ..problem.clone()
    });
    let decode = Candidate::decode_by_table(&short, caps);
    let (Ok(Ok(mut plan)), Ok(Ok(short))) =
        (lay_out(&long, caps, table), lay_out(&short, caps, decode))
    else {
        return None;
    };
    plan.launches.extend(short.launches);
    plan.scratch = plan.scratch.max(short.scratch);
    (plan.splits, plan.split_len) = (short.splits, short.split_len);
    plan.short = Some((few, decode));
    Some(plan)
}

/// The plan of a candidate, or a launch of it that binds more than the device allows even with the small tables packed
/// into one buffer.
fn lay_out(
    problem: &Problem,
    caps: &Caps,
    candidate: Candidate,
) -> Result<std::result::Result<Plan, Launch>> {
    let crowded = |plan: &Plan| {
        let mut launches = plan.launches.iter();
        launches
            .find(|launch| launch.bindings.len() > caps.storage_buffers as usize)
            .cloned()
    };
    let plain = launches(problem, caps, candidate, false)?;
    if crowded(&plain).is_none() {
        return Ok(Ok(plain));
    }
    let packed = launches(problem, caps, candidate, true)?;
    Ok(match crowded(&packed) {
        None => Ok(packed),
        Some(launch) => Err(launch),
    })
}

/// The launches of a candidate, with the small tables `packed` into one buffer for those that would bind more
/// than the device allows.
fn launches(problem: &Problem, caps: &Caps, candidate: Candidate, packed: bool) -> Result<Plan> {
    let mut planner = Planner {
        problem,
        caps,
        packed,
        tables: [0; 2],
        tables_from: [0; 10],
        parts: Vec::new(),
        k_block: 32,
        plan: Plan {
            route: candidate.route,
            candidate,
            short: None,
            tuned: false,
            launches: Vec::new(),
            splits: 1,
            split_len: problem.k_len(),
            scratch: 0,
        },
    };
    match candidate.route {
        Route::ThreePass => planner.three_pass()?,
        Route::Prefill => planner.prefill()?,
        Route::Decode => planner.decode()?,
    }
    Ok(planner.plan)
}

/// The lanes of a team that passes keys and weights around: whole teams in every subgroup.
fn lanes(caps: &Caps) -> Option<u32> {
    let (least, _) = caps.subgroups.filter(|&(least, _)| least >= 4)?;
    Some((1 << least.ilog2()).min(32))
}

/// The lanes of a team that is a whole subgroup, of which there is one size.
fn whole_lanes(caps: &Caps) -> Option<u32> {
    lanes(caps).filter(|&n| n >= 8 && caps.subgroups == Some((n, n)))
}

/// Whether workgroup memory and barriers are dear, and a row of Q a lane passed on is cheap: a processor,
/// whose teams are whole subgroups.
fn by_lanes(caps: &Caps) -> bool {
    caps.software && whole_lanes(caps).is_some()
}

/// Whether a lane may have 128 registers and no more: small subgroups are Intel's, and so may be a device without
/// any.
fn few_registers(caps: &Caps) -> bool {
    !caps.software && caps.subgroups.is_none_or(|(least, _)| least < 32)
}

/// Turns that are left for the keys: those that look for a row's sequence come first.
fn turns_left(problem: &Problem) -> u64 {
    let sequences = if problem.ragged_q { problem.batch } else { 0 };
    TURNS - sequences as u64
}

/// Query rows of one KV head's group up to which `decode` is taken.
fn few_rows(caps: &Caps) -> u32 {
    FEW_ROWS / if by_lanes(caps) { 2 } else { 1 }
}

/// The longest key axis of a candidate of the prefill route.
fn prefill_keys(problem: &Problem, caps: &Caps, candidate: Candidate) -> u64 {
    if !caps.software {
        return u64::MAX;
    }
    // A tile's turns. Matrices by plain loops: a lane's share of each product, and what comes and goes.
    if let Some(coop) =
        Coop::new(problem, caps).filter(|_| candidate.subgroups == Subgroups::Matrices)
    {
        return turns_left(problem) / (coop.turns() as u64 + 200) * coop::BLOCK_K as u64;
    }
    // By lanes: its products, each row's scores and maximum, and its keys' values.
    if let (Some(lanes), Subgroups::Lanes) = (whole_lanes(caps), candidate.subgroups) {
        let keys = 4 * lanes as u64;
        let turns = 1 + problem.head_dim() as u64 / 4 + 2 * candidate.rows as u64 + keys;
        return turns_left(problem) / turns * keys;
    }
    // Staging and products for each 32 columns of D and Dv, and the rows' maxima.
    let tiles = problem.head_dim().div_ceil(32) + problem.value_dim().div_ceil(32).min(4);
    turns_left(problem) / (tiles as u64 * 14 + 34) * 32
}

fn choose_route(problem: &Problem, caps: &Caps) -> Result<Route> {
    let rows = problem
        .q_len()
        .saturating_mul(problem.heads() / problem.kv_heads());
    let prefill = Candidate::prefill_by_table(problem, caps);
    let route = match (problem.wants_weights, problem.options.route) {
        (true, None | Some(Route::ThreePass)) => Route::ThreePass,
        (true, Some(route)) => {
            return Err(Error::refused(
                "route",
                format_args!("{route:?}"),
                "only the three-pass route gives weights",
            ));
        }
        (false, Some(Route::Prefill)) if problem.options.batch_invariant => {
            return Err(Error::refused(
                "route",
                "Prefill",
                "another one: its rows change with those that share their tiles, and batch_invariant is set",
            ));
        }
        (false, Some(route)) => route,
        (false, None) if problem.options.batch_invariant => Route::Decode,
        (false, None) if problem.options.f16_math => Route::Prefill,
        (false, None) if problem.k_len() as u64 > prefill_keys(problem, caps, prefill) => {
            Route::Decode
        }
        (false, None) if rows <= few_rows(caps) || problem.q_len() == 1 => Route::Decode,
        (false, None) => Route::Prefill,
    };
    if problem.options.f16_math && route != Route::Prefill {
        return Err(Error::refused(
            "f16_math",
            true,
            format!("false: only the prefill route has it, and this is {route:?}"),
        ));
    }
    if let (Some(splits), true) = (problem.options.splits, route != Route::Decode) {
        return Err(Error::refused(
            "splits",
            splits,
            "only the decode route splits the key axis",
        ));
    }
    Ok(route)
}
