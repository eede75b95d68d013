//! From a problem and a device's powers to kernels, pure: so that the choice is tested for devices that
//! nobody here owns.

use super::problem::Problem;
use crate::gpu::{Caps, DType, Shader};
use crate::{Error, Result};

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The kernel's variant.
    pub shader: Shader,
    /// Workgroups.
    pub groups: u64,
}

/// What will run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The route taken.
    pub route: Route,
    /// The kernels, in order.
    pub launches: Vec<Launch>,
    /// Parts of the key axis.
    pub splits: u32,
    /// Keys in each part.
    pub split_len: u32,
    /// Elements of f32 scratch.
    pub scratch: u64,
}

/// Query rows of one KV head's group up to which `decode` is taken.
const FEW_ROWS: u32 = 8;
/// Keys below which the key axis is not split.
const SPLIT_AT_LEAST: u32 = 512;
/// Workgroups that keep a large device busy.
const ENOUGH_GROUPS: u32 = 256;
/// Threads of the kernels whose threads are numbered through.
const THREADS: u64 = 64;

/// Chooses the kernels for a problem.
///
/// # Errors
/// [`Error::Refused`] where the device cannot honour the problem, or the forced route cannot.
pub fn plan(problem: &Problem, caps: &Caps) -> Result<Plan> {
    let types = [problem.q_type, problem.kv_type, problem.out_type];
    if types.contains(&DType::F16) && !caps.f16 {
        return Err(Error::refused(
            "the storage type",
            "f16",
            "f32: this device has no f16 in shaders",
        ));
    }
    let [batch, heads, q_len, _] = problem.q.extents;
    let [_, kv_heads, k_len, _] = problem.k.extents;
    let rows = q_len.saturating_mul(heads / kv_heads);
    let route = match (problem.wants_weights, problem.options.route) {
        (true, None | Some(Route::ThreePass)) => Route::ThreePass,
        (true, Some(route)) => {
            return Err(Error::refused(
                "route",
                format_args!("{route:?}"),
                "only the three-pass route gives weights",
            ));
        }
        (false, Some(route)) => route,
        (false, None) if rows <= FEW_ROWS || q_len == 1 => Route::Decode,
        (false, None) => Route::Prefill,
    };
    if let (Some(splits), true) = (problem.options.splits, route != Route::Decode) {
        return Err(Error::refused(
            "splits",
            splits,
            "only the decode route splits the key axis",
        ));
    }
    let bhq = batch as u64 * heads as u64 * q_len as u64;
    let mut plan = Plan {
        route,
        launches: Vec::new(),
        splits: 1,
        split_len: k_len,
        scratch: 0,
    };
    match route {
        Route::ThreePass => plan_three_pass(problem, bhq, &mut plan),
        Route::Prefill => plan_prefill(problem, &mut plan),
        Route::Decode => plan_decode(problem, rows, bhq, &mut plan),
    }
    let row = match route {
        Route::ThreePass => k_len.max(problem.v.extents[3]),
        Route::Prefill | Route::Decode => problem.v.extents[3],
    };
    if (bhq * row as u64).max(plan.scratch) > u32::MAX as u64 {
        return Err(Error::refused(
            "q",
            format_args!("{bhq} rows"),
            "kernels count the elements of results and scratch in 32 bits",
        ));
    }
    Ok(plan)
}

/// A kernel's variant for this problem.
fn shader(kernel: &'static str, problem: &Problem) -> Shader {
    let types = [problem.q_type, problem.kv_type, problem.out_type];
    Shader::new(kernel)
        .with("F16", types.contains(&DType::F16))
        .with("VEC", problem.vec())
        .with("Q_TYPE", problem.q_type.wgsl())
        .with("KV_TYPE", problem.kv_type.wgsl())
        .with("O_TYPE", problem.out_type.wgsl())
        .with("HAS_KV_LEN", problem.has_kv_len)
        .with("HAS_ROWS", problem.has_rows)
        .with("CAUSAL", problem.options.causal)
        .with("TOP_LEFT", problem.options.align == super::Align::TopLeft)
}

fn plan_three_pass(problem: &Problem, rows: u64, plan: &mut Plan) {
    let (k_len, dv) = (problem.k.extents[2] as u64, problem.v.extents[3] as u64);
    let threads = |n: u64| n.div_ceil(THREADS);
    plan.launches = vec![
        Launch {
            shader: shader("scores", problem),
            groups: threads(rows * k_len.div_ceil(4)),
        },
        Launch {
            shader: shader("softmax", problem).with("HAS_ROWS", false),
            groups: rows,
        },
        Launch {
            shader: shader("values", problem),
            groups: threads(rows * dv.div_ceil(4)),
        },
    ];
    plan.scratch = match problem.wants_weights {
        true => 0,
        // Without keys there is still a buffer to bind.
        false => (rows * k_len).max(1),
    };
}

fn plan_prefill(problem: &Problem, plan: &mut Plan) {
    let [batch, heads, q_len, _] = problem.q.extents.map(u64::from);
    let dv = problem.v.extents[3];
    let chunks = dv.div_ceil(32).min(4);
    plan.launches = vec![Launch {
        shader: shader("prefill", problem)
            .with("V_CHUNKS", chunks)
            .with("ROWS", if chunks == 1 { 4u32 } else { 2 }),
        groups: batch * heads * q_len.div_ceil(32) * (dv.div_ceil(chunks * 32) as u64),
    }];
}

fn plan_decode(problem: &Problem, rows: u32, bhq: u64, plan: &mut Plan) {
    let [batch, _, _, d] = problem.q.extents;
    let [_, kv_heads, k_len, _] = problem.k.extents;
    let dv = problem.v.extents[3];
    let quads = d.div_ceil(4);
    let v_quads = dv.div_ceil(4);
    let chunks = v_quads.div_ceil(64);
    let columns = v_quads.div_ceil(chunks);
    // Four rows of the widest head fill 9 KiB of workgroup memory.
    let at_once = rows.next_power_of_two().min(if d > 256 { 4 } else { 8 });
    let groups = batch as u64 * kv_heads as u64 * rows.div_ceil(at_once) as u64;
    let splits = problem.options.splits.unwrap_or_else(|| {
        let wanted = (ENOUGH_GROUPS as u64).div_ceil(groups.max(1)) as u32;
        wanted.min(k_len / SPLIT_AT_LEAST).max(1)
    });
    plan.split_len = k_len.div_ceil(splits).next_multiple_of(64);
    // Whole steps of 64 keys may need fewer parts than were asked for.
    plan.splits = k_len.div_ceil(plan.split_len.max(1)).max(1);
    plan.launches.push(Launch {
        shader: shader("decode", problem)
            .with("ROWS", at_once)
            .with("QUADS", quads)
            .with("COLUMNS", columns)
            .with("SLICES", 64 / columns)
            .with("CHUNKS", chunks)
            .with("SPLIT", plan.splits > 1),
        groups: groups * plan.splits as u64,
    });
    if plan.splits > 1 {
        plan.scratch = bhq * plan.splits as u64 * (dv as u64 + 2);
        plan.launches.push(Launch {
            shader: shader("merge", problem)
                .with("HAS_KV_LEN", false)
                .with("HAS_ROWS", false),
            groups: (bhq * dv as u64).div_ceil(THREADS),
        });
    }
}
