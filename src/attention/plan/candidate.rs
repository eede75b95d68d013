//! The ways to compute a problem, as data: the one that the table by capabilities takes, and those that a
//! measurement may choose among.

use std::fmt;
use std::str::FromStr;

use super::super::problem::Problem;
use super::coop::Coop;
use super::launch::row_blocks;
use super::{
    ENOUGH_GROUPS, Route, SPLIT_AT_LEAST, WORKGROUP_MEMORY, by_lanes, choose_route, few_registers,
    lanes, prefill_keys, turns_left, whole_lanes,
};
use crate::gpu::Caps;
use crate::{Error, Result};

/// What of a kernel goes by subgroup operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subgroups {
    /// Nothing: `prefill`, `decode`, the three passes.
    Unused,
    /// A row's maximum: `prefill`.
    Maxima,
    /// What threads pass to each other: `prefill_lanes`, `decode_lanes`.
    Lanes,
    /// The products, on cooperative matrices: `prefill_coop`.
    Matrices,
}

/// A way to compute a problem: which kernel, and its sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Candidate {
    /// The route.
    pub route: Route,
    /// Which of the route's kernels.
    pub subgroups: Subgroups,
    /// Query rows that a thread holds; 1 where it is always one.
    pub rows: u32,
    /// Keys of a lane in a step of `decode_lanes`; else 1.
    pub keys: u32,
    /// Parts of the key axis that are asked for; whole steps may need fewer.
    pub splits: u32,
    /// Weights and values are multiplied in f16: `prefill`, where [`Options::f16_math`] allows it.
    ///
    /// [`Options::f16_math`]: crate::attention::Options::f16_math
    pub f16_math: bool,
}

/// Scratch of the three passes, in words, up to which a measurement may choose them.
const THREE_PASS_SCRATCH: u64 = 1 << 18;
/// Query rows of one KV head's group up to which `decode` is worth a measurement.
const DECODE_ROWS: u32 = 64;
/// Keys of a part below which no measurement splits.
const LEAST_PART: u32 = 256;
/// Workgroups past which more parts keep no device busier.
const MOST_GROUPS: u64 = 1024;

/// Query rows of one KV head's group.
fn group_rows(problem: &Problem) -> u32 {
    let group = problem.heads() / problem.kv_heads();
    match problem.few_queries() {
        // Most short sequences are single tokens.
        Some(few) => few.saturating_mul(group).min(group.max(4)),
        None => problem.q_len().saturating_mul(group),
    }
}

/// What a lane of a decode kernel holds for so many rows and keys: O; product, score and weight of each
/// key; the rest.
fn decode_registers(problem: &Problem, lanes: Option<u32>, rows: u32, keys: u32) -> u32 {
    let chunks = problem
        .value_dim()
        .div_ceil(4)
        .div_ceil(lanes.unwrap_or(64));
    rows * (4 * chunks + 3 * keys + 8)
}

/// The registers of a lane, roughly. A processor keeps what does not fit its registers in its nearest cache;
/// on Intel 8 rows spilled 37 to 312.
fn register_room(caps: &Caps, lanes: Option<u32>) -> u32 {
    match (caps.software, lanes) {
        (true, Some(_)) => 300,
        (_, Some(32)) => 224,
        _ => 96,
    }
}

/// Query rows at once that a decode kernel has room for, up to 8.
fn decode_rows(problem: &Problem, caps: &Caps, lanes: Option<u32>) -> u32 {
    let most = match problem.options.batch_invariant {
        true => 8,
        false => group_rows(problem).min(8),
    };
    let mut rows = most.next_power_of_two();
    let least_keys = if lanes.is_some() { 1 } else { 4 };
    while rows > 1
        && (decode_memory(problem, lanes, rows) > WORKGROUP_MEMORY
            || decode_registers(problem, lanes, rows, least_keys) > register_room(caps, lanes))
    {
        rows /= 2;
    }
    rows
}

/// Parts of the key axis that keep the device busy and are not too short.
fn enough_splits(problem: &Problem, caps: &Caps, rows: u32) -> u32 {
    let enough = ENOUGH_GROUPS[usize::from(caps.software)];
    let wanted = enough.div_ceil(decode_groups(problem, rows).max(1)) as u32;
    wanted.min(problem.k_len() / SPLIT_AT_LEAST).max(1)
}

/// Workgroup memory of a decode kernel.
fn decode_memory(problem: &Problem, lanes: Option<u32>, rows: u32) -> u32 {
    let quads = problem.head_dim().div_ceil(4);
    match lanes {
        Some(lanes) => rows * (quads * 16 + 64 / lanes * 8 + 1036),
        None => rows * (quads * 16 + 1288) + 1024,
    }
}

/// Chunks of value columns that a workgroup of `prefill_lanes` takes.
fn value_chunks(problem: &Problem, lanes: u32) -> u32 {
    problem.value_dim().div_ceil(4 * lanes).min(4)
}

impl Candidate {
    /// What is taken where nothing was measured: a table by capabilities.
    pub(super) fn by_table(problem: &Problem, caps: &Caps) -> Result<Candidate> {
        Ok(match choose_route(problem, caps)? {
            Route::ThreePass => Candidate::three_pass(),
            Route::Prefill => Candidate::prefill_by_table(problem, caps),
            Route::Decode => Candidate::decode_by_table(problem, caps),
        })
    }

    /// What the table takes on the decode route.
    pub(super) fn decode_by_table(problem: &Problem, caps: &Caps) -> Candidate {
        let lanes = lanes(caps);
        let subgroups = match lanes {
            Some(_) => Subgroups::Lanes,
            None => Subgroups::Unused,
        };
        let rows = decode_rows(problem, caps, lanes);
        let room = register_room(caps, lanes);
        // Several rows and keys share what is read; few rows would only use up registers, which a processor
        // does not mind where most keys of a step are there.
        let long =
            problem.k_len() >= 256 && !problem.has_kv_len && !problem.options.batch_invariant;
        let many = lanes.is_some()
            && (rows >= 4 || by_lanes(caps) && long)
            && decode_registers(problem, lanes, rows, 4) <= room;
        Candidate {
            route: Route::Decode,
            subgroups,
            rows,
            keys: if many { 4 } else { 1 },
            splits: match problem.options.splits {
                Some(splits) => splits,
                None => enough_splits(problem, caps, rows),
            },
            f16_math: false,
        }
    }

    /// What the table takes on the prefill route.
    pub(super) fn prefill_by_table(problem: &Problem, caps: &Caps) -> Candidate {
        if Coop::new(problem, caps).is_some() {
            return Candidate::prefill(Subgroups::Matrices, 1);
        }
        // Of the other kernels only `prefill` has products in f16.
        let lanes = whole_lanes(caps).filter(|_| by_lanes(caps) && !problem.options.f16_math);
        match lanes {
            // More rows of many columns would take more than a second to compile.
            Some(lanes) if value_chunks(problem, lanes) > 2 || group_rows(problem) <= 32 => {
                Candidate::prefill(Subgroups::Lanes, 16)
            }
            Some(_) => Candidate::prefill(Subgroups::Lanes, 24),
            None => {
                let shuffles = caps.subgroups.is_some_and(|(least, _)| least >= 8);
                let subgroups = if shuffles {
                    Subgroups::Maxima
                } else {
                    Subgroups::Unused
                };
                let narrow = problem.value_dim() <= 32 && !few_registers(caps);
                let rows = if narrow { 4 } else { 2 };
                Candidate {
                    f16_math: problem.options.f16_math,
                    ..Candidate::prefill(subgroups, rows)
                }
            }
        }
    }

    pub(super) fn three_pass() -> Candidate {
        Candidate {
            route: Route::ThreePass,
            subgroups: Subgroups::Unused,
            rows: 1,
            keys: 1,
            splits: 1,
            f16_math: false,
        }
    }

    fn prefill(subgroups: Subgroups, rows: u32) -> Candidate {
        Candidate {
            route: Route::Prefill,
            subgroups,
            rows,
            ..Candidate::three_pass()
        }
    }

    /// Lanes of a team that the kernel passes values around in.
    pub(super) fn lanes(&self, caps: &Caps) -> Option<u32> {
        match (self.subgroups, self.route) {
            (Subgroups::Lanes, Route::Prefill) => whole_lanes(caps),
            (Subgroups::Lanes, Route::Decode) => lanes(caps),
            _ => None,
        }
    }

    /// Whether a kernel of these sizes exists and a device of these powers can run it on this problem.
    pub fn fits(&self, problem: &Problem, caps: &Caps) -> bool {
        let lanes = self.lanes(caps);
        let shuffles = caps.subgroups.is_some_and(|(least, _)| least >= 8);
        let kernel = match self.subgroups {
            Subgroups::Unused => true,
            Subgroups::Maxima => self.route == Route::Prefill && shuffles,
            Subgroups::Lanes => lanes.is_some(),
            Subgroups::Matrices => Coop::new(problem, caps).is_some(),
        };
        let sizes = match (self.route, self.subgroups) {
            (Route::ThreePass, _) => self.rows == 1 && three_pass_fits(problem, caps),
            (Route::Prefill, Subgroups::Matrices) => self.rows == 1,
            (Route::Prefill, Subgroups::Lanes) => [8, 16, 24, 32].contains(&self.rows),
            (Route::Prefill, _) => [2, 4].contains(&self.rows),
            (Route::Decode, _) => {
                [1, 2, 4, 8].contains(&self.rows)
                    && decode_memory(problem, lanes, self.rows) <= WORKGROUP_MEMORY
            }
        };
        let decodes = self.route == Route::Decode;
        let in_f16 = self.route == Route::Prefill
            && matches!(self.subgroups, Subgroups::Unused | Subgroups::Maxima)
            && problem.options.f16_math;
        kernel
            && sizes
            && (!self.f16_math || in_f16)
            && (self.keys == 1 || decodes && lanes.is_some() && self.keys == 4)
            && (self.splits == 1 || decodes && (2..=problem.k_len().max(1)).contains(&self.splits))
            && (self.route != Route::Prefill
                || problem.k_len() as u64 <= prefill_keys(problem, caps, *self))
    }

    /// The kernels that are worth a measurement on this problem, the table's own first, each with the parts
    /// of the key axis that the table gives it; empty where a measurement chooses nothing.
    pub fn kernels(problem: &Problem, caps: &Caps) -> Vec<Candidate> {
        let (true, Ok(table)) = (problem.is_tunable(), Candidate::by_table(problem, caps)) else {
            return Vec::new();
        };
        let (rows, few) = (group_rows(problem), few_registers(caps));
        let mut all = vec![table];
        if problem.q_len() > 1 || rows > 8 {
            all.push(Candidate::prefill(Subgroups::Matrices, 1));
            if let Some(lanes) = whole_lanes(caps) {
                // Past so many registers a kernel spills, and compiles for seconds.
                let held = 1 + value_chunks(problem, lanes);
                let sizes = [8, 16, 24, 32].into_iter();
                let sizes =
                    sizes.filter(|&n| n * held <= 80 && (n == 8 || n < rows.saturating_mul(2)));
                all.extend(sizes.map(|n| Candidate::prefill(Subgroups::Lanes, n)));
            }
            // On a processor each lane's read of workgroup memory is one of its own.
            if !by_lanes(caps) {
                // Four rows spill where registers are few.
                let sizes = if few { &[2][..] } else { &[2, 4] };
                for subgroups in [Subgroups::Maxima, Subgroups::Unused] {
                    for f16_math in [false, true] {
                        all.extend(sizes.iter().map(|&n| Candidate {
                            f16_math,
                            ..Candidate::prefill(subgroups, n)
                        }));
                    }
                }
            }
        }
        if rows <= DECODE_ROWS || table.route == Route::Decode {
            let kinds = match lanes(caps) {
                Some(_) if by_lanes(caps) => vec![Subgroups::Lanes],
                Some(_) => vec![Subgroups::Lanes, Subgroups::Unused],
                None => vec![Subgroups::Unused],
            };
            for subgroups in kinds {
                let mut candidate = Candidate {
                    route: Route::Decode,
                    subgroups,
                    ..Candidate::three_pass()
                };
                let lanes = candidate.lanes(caps);
                let table = decode_rows(problem, caps, lanes);
                // Half of the rows reads K and V twice as often, which a processor never hides.
                let half = (!by_lanes(caps)).then_some(table / 2);
                let double = Some(2 * table).filter(|&n| n <= rows.next_power_of_two());
                // What is read for four keys of more than 256 value columns spills where registers are few.
                let wide = few && problem.value_dim() > 256;
                let keys_of_lane = if wide { &[1][..] } else { &[4, 1] };
                for n in [Some(table), half, double].into_iter().flatten() {
                    for &keys in keys_of_lane {
                        // A guess, which a measurement may put right, but where registers are few.
                        let room = register_room(caps, lanes) * if few { 1 } else { 2 };
                        if decode_registers(problem, lanes, n, keys) <= room {
                            (candidate.rows, candidate.keys) = (n, keys);
                            candidate.splits = enough_splits(problem, caps, n.max(1));
                            all.push(candidate);
                        }
                    }
                }
            }
        }
        all.push(Candidate::three_pass());
        let mut seen = Vec::new();
        all.retain(|candidate| {
            let new = !seen.contains(candidate) && candidate.fits(problem, caps);
            seen.push(*candidate);
            new
        });
        all
    }

    /// The same kernel with the key axis in other numbers of parts.
    pub fn other_splits(&self, problem: &Problem, caps: &Caps) -> Vec<Candidate> {
        if self.route != Route::Decode {
            return Vec::new();
        }
        let groups = decode_groups(problem, self.rows);
        let splits = (0..8).map(|log| 4u32.pow(log));
        splits
            .filter(|&n| n == 1 || problem.k_len() / n >= LEAST_PART)
            .filter(|&n| n == 1 || groups * n as u64 <= MOST_GROUPS)
            .filter(|&n| n != self.splits)
            .map(|splits| Candidate { splits, ..*self })
            .filter(|candidate| candidate.fits(problem, caps))
            .collect()
    }
}

/// Workgroups of a decode kernel over the whole key axis that have rows.
fn decode_groups(problem: &Problem, rows: u32) -> u64 {
    let blocks = match problem.few_queries() {
        Some(_) => problem.batch as u64,
        None => row_blocks(problem, problem.batch, rows),
    };
    problem.kv_heads() as u64 * blocks
}

fn three_pass_fits(problem: &Problem, caps: &Caps) -> bool {
    let rows = problem.batch as u64 * problem.heads() as u64 * problem.q_len() as u64;
    let cells = rows * problem.k_len() as u64;
    cells <= THREE_PASS_SCRATCH.min(caps.max_binding / 4)
        && !(caps.software && problem.k_len() as u64 > 4 * turns_left(problem))
}

impl Problem {
    /// Whether the plan is free to choose, and for keys that lie one behind the other, which is what
    /// measurements are made on.
    pub(super) fn is_tunable(&self) -> bool {
        let options = &self.options;
        let free = !options.batch_invariant
            && options.route.is_none()
            && options.splits.is_none()
            && !self.wants_weights;
        let plain = !self.ragged_q && !self.ragged_k && !self.has_rows && self.pages.is_none();
        let own = options.score_mod.is_none() && options.mask_mod.is_none();
        free && plain && own && self.q_len() > 0 && self.k_len() > 0
    }

    /// What the best choice depends on, as text: head dims, group, types and the kind of mask exactly; KV
    /// heads of all batch rows, Q, K and a window up to the next power of two. `None` where nothing measured
    /// is ever taken: a batch-invariant or forced plan, weights, ragged or paged sequences, histories,
    /// functions of the caller's.
    pub fn bucket(&self) -> Option<String> {
        if !self.is_tunable() {
            return None;
        }
        let up = |n: u32| n.checked_next_power_of_two().unwrap_or(u32::MAX);
        let [q, k, v, out] = self.types.map(|dtype| dtype.name());
        let [left, right] = self.window();
        let mut text = format!(
            "heads {} group {} q {} k {} d {} dv {} {q} {k} {v} {out}",
            up(self.batch.saturating_mul(self.kv_heads())),
            self.heads() / self.kv_heads(),
            up(self.q_len()),
            up(self.k_len()),
            self.head_dim(),
            self.value_dim(),
        );
        match right {
            Some(0) => text += " causal",
            Some(right) => text += &format!(" ahead {}", up(right)),
            None => {}
        }
        if let Some(left) = left {
            text += &format!(" window {}", up(left));
        }
        if self.mask.is_some() || self.bias.is_some() {
            text += " masked";
        }
        if self.options.f16_math {
            text += " f16 math";
        }
        Some(text)
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Candidate {
            rows, keys, splits, ..
        } = self;
        let route = match self.route {
            Route::ThreePass => return write!(f, "three-pass"),
            Route::Prefill => "prefill",
            Route::Decode => "decode",
        };
        let subgroups = match self.subgroups {
            Subgroups::Unused => "",
            Subgroups::Maxima => " by maxima",
            Subgroups::Lanes => " by lanes",
            Subgroups::Matrices => " by matrices",
        };
        let in_f16 = if self.f16_math { " in f16" } else { "" };
        write!(f, "{route}{subgroups}{in_f16}, {rows} rows")?;
        match self.route {
            Route::Decode => write!(f, ", {keys} keys, {splits} splits"),
            _ => Ok(()),
        }
    }
}

/// Reads what [`Display`](fmt::Display) writes.
impl FromStr for Candidate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Candidate> {
        let read = || {
            let mut parts = text.split(", ");
            let name = parts.next()?;
            let (name, f16_math) = match name.strip_suffix(" in f16") {
                Some(name) => (name, true),
                None => (name, false),
            };
            let (route, subgroups) = match name {
                "three-pass" => (Route::ThreePass, Subgroups::Unused),
                "prefill" => (Route::Prefill, Subgroups::Unused),
                "prefill by maxima" => (Route::Prefill, Subgroups::Maxima),
                "prefill by lanes" => (Route::Prefill, Subgroups::Lanes),
                "prefill by matrices" => (Route::Prefill, Subgroups::Matrices),
                "decode" => (Route::Decode, Subgroups::Unused),
                "decode by lanes" => (Route::Decode, Subgroups::Lanes),
                _ => return None,
            };
            let mut number = |unit: &str| -> Option<u32> {
                let (number, word) = parts.next()?.split_once(' ')?;
                number.parse().ok().filter(|&n| n > 0 && word == unit)
            };
            let mut candidate = Candidate {
                route,
                subgroups,
                f16_math,
                ..Candidate::three_pass()
            };
            if f16_math && route != Route::Prefill {
                return None;
            }
            if route != Route::ThreePass {
                candidate.rows = number("rows")?;
            }
            if route == Route::Decode {
                candidate.keys = number("keys")?;
                candidate.splits = number("splits")?;
            }
            parts.next().is_none().then_some(candidate)
        };
        read().ok_or_else(|| Error::refused("a candidate", format_args!("{text:?}"), "one of ours"))
    }
}
