//! From a problem and a device's powers to kernels, pure: so that the choice is tested for devices that
//! nobody here owns.

use std::sync::Arc;

use super::problem::{Layout, Params, Problem, Stage};
use crate::gpu::{Caps, DType, Shader, wgsl_type};
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
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// The kernel's variant.
    pub shader: Shader,
    /// What it binds behind its parameters, in order: names, and the bytes of the tensor that it sees, all
    /// of them if not given.
    pub(crate) bindings: Vec<(Arc<str>, Option<[u64; 2]>)>,
    pub(crate) params: Params,
    /// Workgroups.
    pub groups: u64,
}

/// What will run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The route taken.
    pub route: Route,
    /// The kernels, in order.
    pub launches: Vec<Launch>,
    /// Parts of the key axis.
    pub splits: u32,
    /// Keys in each part.
    pub split_len: u32,
    /// 32-bit words of scratch, which the caller may lend.
    pub scratch: u64,
}

/// Query rows of one KV head's group up to which `decode` is taken.
const FEW_ROWS: u32 = 16;
/// Keys below which the key axis is not split.
const SPLIT_AT_LEAST: u32 = 512;
/// Keys of each part where a row's result may not depend on its neighbours.
const INVARIANT_SPLIT: u32 = 1024;
/// Workgroups that keep a large device busy.
const ENOUGH_GROUPS: u32 = 256;
/// Threads of the kernels whose threads are numbered through.
const THREADS: u64 = 64;
/// Multiply-adds of one launch: a tenth of a second or so on a small device, well below any watchdog.
const WORK: u64 = 1 << 36;
/// Turns of all its loops that a thread may take on a processor: Mesa's software driver before 25 ends
/// every loop, without a word, once a thread has taken 65,535.
const TURNS: u64 = 60_000;
/// Workgroup memory of every device.
const WORKGROUP_MEMORY: u32 = 16_384;

/// Chooses the kernels for a problem.
///
/// # Errors
/// [`Error::Refused`] where the device cannot honour the problem, or the forced route cannot.
pub fn plan(problem: &Problem, caps: &Caps) -> Result<Plan> {
    let f16 = problem.types.contains(&DType::F16) || problem.bias_type == Some(DType::F16);
    if f16 && !caps.f16 {
        return Err(Error::refused(
            "the storage type",
            "f16",
            "f32 or bf16: this device has no f16 in shaders",
        ));
    }
    let route = choose_route(problem, caps)?;
    let mut planner = Planner {
        problem,
        caps,
        parts: Vec::new(),
        plan: Plan {
            route,
            launches: Vec::new(),
            splits: 1,
            split_len: problem.k_len(),
            scratch: 0,
        },
    };
    match route {
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

/// Whether workgroup memory and barriers are dear, and a row of Q a lane passed on is cheap: a processor,
/// whose teams are whole subgroups.
fn by_lanes(caps: &Caps) -> bool {
    caps.software && lanes(caps).is_some_and(|n| n >= 8 && caps.subgroups == Some((n, n)))
}

/// The longest key axis of the prefill route.
fn prefill_keys(problem: &Problem, caps: &Caps) -> u64 {
    if !caps.software {
        return u64::MAX;
    }
    // A tile's turns: staging and products for each 32 columns of D and Dv, and the rows' maxima.
    let tiles = problem.head_dim().div_ceil(32) + problem.value_dim().div_ceil(32).min(4);
    TURNS / (tiles as u64 * 14 + 34) * 32
}

fn choose_route(problem: &Problem, caps: &Caps) -> Result<Route> {
    let rows = problem
        .q_len()
        .saturating_mul(problem.heads() / problem.kv_heads());
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
        (false, None) if problem.options.batch_invariant || by_lanes(caps) => Route::Decode,
        (false, None) if problem.k_len() as u64 > prefill_keys(problem, caps) => Route::Decode,
        (false, None) if rows <= FEW_ROWS || problem.q_len() == 1 => Route::Decode,
        (false, None) => Route::Prefill,
    };
    if let (Some(splits), true) = (problem.options.splits, route != Route::Decode) {
        return Err(Error::refused(
            "splits",
            splits,
            "only the decode route splits the key axis",
        ));
    }
    Ok(route)
}

/// Which of the optional tensors a kernel reads.
#[derive(Clone, Copy, Default)]
struct Uses {
    /// Lengths and positions, which bound the keys of a row.
    keys: bool,
    /// What changes scores: biases, masks, functions.
    scores: bool,
    /// Of these, the masks.
    masks: bool,
    /// Histories.
    rows: bool,
    sinks: bool,
}

/// Batch rows and KV heads that one launch sees.
#[derive(Clone, Copy)]
struct Part {
    batch: [u32; 2],
    kv: [u32; 2],
}

struct Planner<'a> {
    problem: &'a Problem,
    caps: &'a Caps,
    parts: Vec<Part>,
    plan: Plan,
}

/// One kernel over one part, still in one piece.
struct Kernel {
    shader: Shader,
    buffers: Vec<&'static str>,
    uses: Uses,
    /// Workgroups, or threads where these are numbered through.
    count: u64,
    threads: bool,
    /// Blocks of query rows.
    blocks: u64,
    /// Multiply-adds of a workgroup.
    work: u64,
}

impl Planner<'_> {
    fn group(&self) -> u32 {
        self.problem.heads() / self.problem.kv_heads()
    }

    /// All rows of a part.
    fn rows(&self, part: Part) -> u64 {
        let heads = ((part.kv[1] - part.kv[0]) * self.group()) as u64;
        let batch = match self.problem.ragged_q {
            true => 1,
            false => (part.batch[1] - part.batch[0]) as u64,
        };
        batch * heads * self.problem.q_len() as u64
    }

    /// Blocks of `size` rows over the batch rows of a part; at least so many where they are ragged.
    fn blocks(&self, part: Part, size: u32) -> u64 {
        let rows = self.problem.q_len() as u64 * self.group() as u64;
        match self.problem.ragged_q {
            true => rows / size as u64 + self.problem.batch as u64,
            false => (part.batch[1] - part.batch[0]) as u64 * rows.div_ceil(size as u64),
        }
    }

    fn three_pass(&mut self) -> Result<()> {
        let problem = self.problem;
        let (k_len, dv) = (problem.k_len() as u64, problem.value_dim() as u64);
        let stage = problem.options.stage;
        let own_scratch = !problem.wants_weights || stage != Stage::Softmax;
        let rows = self.all_rows();
        if own_scratch {
            // Without keys there is still a buffer to bind.
            self.plan.scratch = (rows * k_len).max(1);
        }
        self.count_in_32_bits(rows * k_len.max(dv))?;
        if self.caps.software && k_len / 4 > TURNS {
            return Err(Error::refused(
                "k",
                format_args!("{k_len} rows"),
                format!(
                    "at most {} on the three-pass route: this driver cuts longer loops",
                    4 * TURNS
                ),
            ));
        }
        self.make_parts(&["q", "k", "v", "o", "weights", "lse"])?;
        for part in self.parts.clone() {
            let rows = self.rows(part);
            let keys = Uses {
                keys: true,
                ..Uses::default()
            };
            let scores = Uses {
                scores: true,
                masks: true,
                rows: true,
                ..keys
            };
            let name = match stage {
                Stage::Raw => "raw",
                Stage::Softcap => "softcap",
                Stage::Biased => "biased",
                Stage::Softmax => "softmax",
            };
            let mut buffers = vec!["q", "k", "weights"];
            buffers.extend((stage != Stage::Softmax).then_some("stage"));
            self.launch(
                part,
                Kernel {
                    shader: self.shader("scores", scores).with("STAGE", name),
                    buffers,
                    uses: scores,
                    count: rows * k_len.div_ceil(4),
                    threads: true,
                    blocks: 1,
                    work: THREADS * 4 * problem.head_dim() as u64,
                },
            )?;
            let uses = Uses {
                sinks: true,
                ..keys
            };
            let mut buffers = vec!["weights"];
            buffers.extend(problem.wants_lse.then_some("lse"));
            self.launch(
                part,
                Kernel {
                    shader: self.shader("softmax", uses),
                    buffers,
                    uses,
                    count: rows,
                    threads: false,
                    blocks: 1,
                    work: k_len,
                },
            )?;
            let uses = Uses { rows: true, ..keys };
            self.launch(
                part,
                Kernel {
                    shader: self.shader("values", uses),
                    buffers: vec!["weights", "v", "o"],
                    uses,
                    count: rows * dv.div_ceil(4),
                    threads: true,
                    blocks: 1,
                    work: THREADS * 4 * k_len,
                },
            )?;
        }
        Ok(())
    }

    fn prefill(&mut self) -> Result<()> {
        let problem = self.problem;
        let dv = problem.value_dim();
        let chunks = dv.div_ceil(32).min(4);
        let subgroups = self.caps.subgroups.is_some_and(|(least, _)| least >= 8);
        self.make_parts(&["q", "k", "v", "o", "lse"])?;
        if problem.k_len() as u64 > prefill_keys(problem, self.caps) {
            return Err(Error::refused(
                "k",
                format_args!("{} rows", problem.k_len()),
                "fewer on the prefill route: this driver cuts longer loops",
            ));
        }
        let by_element = problem.mask.is_some() || problem.options.mask_mod.is_some();
        let k_blocks = problem.k_len().div_ceil(32) as u64;
        for part in self.parts.clone() {
            let kv = (part.kv[1] - part.kv[0]) as u64;
            let blocks = self.blocks(part, 32);
            let tiles = kv * blocks * k_blocks;
            let map = by_element
                && problem.q_len() >= 64
                && problem.k_len() >= 64
                && tiles * 4 <= self.caps.max_binding;
            if map {
                self.plan.scratch = self.plan.scratch.max(tiles);
                let uses = Uses {
                    keys: true,
                    masks: true,
                    ..Uses::default()
                };
                self.launch(
                    part,
                    Kernel {
                        shader: self.shader("block_map", uses),
                        buffers: vec!["block_map"],
                        uses,
                        count: tiles,
                        threads: false,
                        blocks,
                        work: 1024,
                    },
                )?;
            }
            let uses = Uses {
                keys: true,
                scores: true,
                masks: true,
                rows: true,
                sinks: true,
            };
            let mut buffers = vec!["q", "k", "v", "o"];
            buffers.extend(problem.wants_lse.then_some("lse"));
            buffers.extend(map.then_some("block_map"));
            let columns = (problem.head_dim() + chunks * 32) as u64;
            self.launch(
                part,
                Kernel {
                    shader: self
                        .shader("prefill", uses)
                        .with("V_CHUNKS", chunks)
                        .with("ROWS", if chunks == 1 { 4u32 } else { 2 })
                        .with("SUBGROUPS", subgroups)
                        .with("HAS_BLOCK_MAP", map),
                    buffers,
                    uses,
                    count: kv * blocks * dv.div_ceil(chunks * 32) as u64,
                    threads: false,
                    blocks,
                    work: 32 * problem.k_len() as u64 * columns,
                },
            )?;
        }
        Ok(())
    }

    fn decode(&mut self) -> Result<()> {
        let problem = self.problem;
        let invariant = problem.options.batch_invariant;
        let (k_len, dv) = (problem.k_len(), problem.value_dim());
        let quads = problem.head_dim().div_ceil(4);
        let v_quads = dv.div_ceil(4);
        let lanes = lanes(self.caps);
        let rows = match invariant {
            true => 8,
            false => problem.q_len().saturating_mul(self.group()).min(8),
        };
        let mut at_once = rows.next_power_of_two();
        let memory = |rows: u32| match lanes {
            Some(lanes) => rows * (quads * 16 + 64 / lanes * 8 + 1032),
            None => rows * (quads * 16 + 1284) + 1024,
        };
        // What a lane holds for so many rows and keys: O; product, score and weight of each key; the rest. A
        // processor keeps what does not fit its registers in its nearest cache; small subgroups are
        // Intel's, with 128 registers (8 rows spilled 37 to 312 of them there), and so may be a device
        // without any.
        let chunks = v_quads.div_ceil(lanes.unwrap_or(64));
        let registers = |rows: u32, keys: u32| rows * (4 * chunks + 3 * keys + 8);
        let room = match (self.caps.software, lanes) {
            (true, Some(_)) => 300,
            (_, Some(32)) => 224,
            _ => 96,
        };
        let least_keys = if lanes.is_some() { 1 } else { 4 };
        while at_once > 1
            && (memory(at_once) > WORKGROUP_MEMORY || registers(at_once, least_keys) > room)
        {
            at_once /= 2;
        }
        // Several rows and keys share what is read; few rows would only use up registers.
        let keys = if at_once >= 4 && registers(at_once, 4) <= room {
            4u32
        } else {
            1
        };
        let whole = Part {
            batch: [0, problem.batch],
            kv: [0, problem.kv_heads()],
        };
        let groups = problem.kv_heads() as u64 * self.blocks(whole, at_once);
        let split_len = match (problem.options.splits, invariant) {
            (Some(splits), _) => k_len.div_ceil(splits),
            (None, true) => INVARIANT_SPLIT,
            (None, false) => {
                let wanted = (ENOUGH_GROUPS as u64).div_ceil(groups.max(1)) as u32;
                k_len.div_ceil(wanted.min(k_len / SPLIT_AT_LEAST).max(1))
            }
        };
        // Turns for 256 keys: queries and values of each step, and without subgroups the rows' maxima.
        let turns = match lanes {
            Some(lanes) => (quads + lanes + 1) * 4 / keys,
            None => {
                let slices = 64 / v_quads.div_ceil(v_quads.div_ceil(64));
                4 * (quads + 1) + 64 * at_once + 256 / slices + 1
            }
        };
        let most = match self.caps.software {
            true => (TURNS / turns as u64 * 256) as u32,
            false => u32::MAX,
        };
        if let (Some(splits), true) = (problem.options.splits, split_len > most) {
            return Err(Error::refused(
                "splits",
                splits,
                format!(
                    "at least {}: this driver cuts longer loops",
                    k_len.div_ceil(most)
                ),
            ));
        }
        self.plan.split_len = split_len.min(most).next_multiple_of(64).max(64);
        // Whole steps of 64 keys may need fewer parts than were asked for.
        self.plan.splits = k_len.div_ceil(self.plan.split_len).max(1);
        let split = self.plan.splits > 1;
        if split {
            self.plan.scratch = self.all_rows() * self.plan.splits as u64 * (dv as u64 + 2);
        }
        self.count_in_32_bits(self.plan.scratch)?;
        self.make_parts(&["q", "k", "v", "o", "parts", "lse"])?;
        for part in self.parts.clone() {
            let uses = Uses {
                keys: true,
                scores: true,
                masks: true,
                rows: true,
                sinks: !split,
            };
            let [left, right] = problem.window();
            let ranges = right.is_some() || problem.has_prefix;
            let few_see = invariant || left.is_some() || (ranges && problem.q_len() > 1);
            let base = |kernel| {
                self.shader(kernel, uses)
                    .with("ROWS", at_once)
                    .with("QUADS", quads)
                    .with("SPLIT", split)
                    .with("FEW_SEE", few_see)
                    .with("INVARIANT", invariant)
            };
            let shader = match lanes {
                Some(lanes) => base("decode_lanes")
                    .with("LANES", lanes)
                    .with("KEYS", keys)
                    .with("Q_BY_LANES", by_lanes(self.caps))
                    .with("CHUNKS", v_quads.div_ceil(lanes)),
                None => {
                    let chunks = v_quads.div_ceil(64);
                    let columns = v_quads.div_ceil(chunks);
                    base("decode")
                        .with("COLUMNS", columns)
                        .with("SLICES", 64 / columns)
                        .with("CHUNKS", chunks)
                }
            };
            let kv = (part.kv[1] - part.kv[0]) as u64;
            let blocks = self.blocks(part, at_once);
            let mut buffers = vec!["q", "k", "v", if split { "parts" } else { "o" }];
            buffers.extend((problem.wants_lse && !split).then_some("lse"));
            self.launch(
                part,
                Kernel {
                    shader,
                    buffers,
                    uses,
                    count: kv * blocks * self.plan.splits as u64,
                    threads: false,
                    blocks,
                    work: at_once as u64
                        * self.plan.split_len as u64
                        * (problem.head_dim() + dv) as u64,
                },
            )?;
            if split {
                let uses = Uses {
                    sinks: true,
                    ..Uses::default()
                };
                let mut buffers = vec!["parts", "o"];
                buffers.extend(problem.wants_lse.then_some("lse"));
                self.launch(
                    part,
                    Kernel {
                        shader: self.shader("merge", uses),
                        buffers,
                        uses,
                        count: self.rows(part) * v_quads as u64,
                        threads: true,
                        blocks: 1,
                        work: THREADS * 4 * self.plan.splits as u64,
                    },
                )?;
            }
        }
        Ok(())
    }

    fn all_rows(&self) -> u64 {
        self.rows(Part {
            batch: [0, self.problem.batch],
            kv: [0, self.problem.kv_heads()],
        })
    }

    fn count_in_32_bits(&self, elements: u64) -> Result<()> {
        if elements > u32::MAX as u64 {
            return Err(Error::refused(
                "q",
                format_args!("{} rows", self.all_rows()),
                "kernels count the elements of scores and scratch in 32 bits",
            ));
        }
        Ok(())
    }

    /// Cuts the problem along batch rows, then KV heads, until the device can bind what each part sees.
    fn make_parts(&mut self, names: &[&'static str]) -> Result<()> {
        let problem = self.problem;
        let (batch, kv) = (problem.batch, problem.kv_heads());
        let share = batch / problem.kv_batch();
        let whole = Part {
            batch: [0, batch],
            kv: [0, kv],
        };
        let by_batch = |step: u32, heads: u32| {
            (0..batch).step_by(step as usize).flat_map(move |b| {
                (0..kv).step_by(heads as usize).map(move |h| Part {
                    batch: [b, b + step],
                    kv: [h, h + heads],
                })
            })
        };
        let mut choices = vec![vec![whole]];
        if problem.ragged_q || problem.ragged_k {
            choices.push(by_batch(batch, 1).collect());
        } else {
            choices.push(by_batch(share, kv).collect());
            choices.push(by_batch(share, 1).collect());
        }
        let mut names = names.to_vec();
        names.extend(["bias", "mask"]);
        let mut too_large = None;
        for parts in choices {
            let worst = parts
                .iter()
                .flat_map(|&part| names.iter().map(move |&name| (part, name)))
                .filter_map(|(part, name)| Some((name, self.slice(name, part)?)))
                .map(|(name, [from, to])| (name, to - from))
                .max_by_key(|&(_, bytes)| bytes);
            match worst.filter(|&(_, bytes)| bytes > self.caps.max_binding) {
                None => {
                    self.parts = parts;
                    return Ok(());
                }
                worst => too_large = worst,
            }
        }
        let (name, bytes) = too_large.expect("some part did not fit");
        Err(Error::refused(
            name,
            format_args!("{bytes} bytes for one head of one batch row"),
            format!("this device binds at most {} bytes", self.caps.max_binding),
        ))
    }

    /// The bytes of a tensor that a part sees, from an offset that may be bound; `None` for small tables and
    /// for what has no elements.
    fn slice(&self, name: &str, part: Part) -> Option<[u64; 2]> {
        let problem = self.problem;
        let group = self.group();
        let heads = part.kv.map(|kv| kv * group);
        let share = problem.batch / problem.kv_batch();
        let batch = match problem.ragged_q {
            true => [0, 1],
            false => part.batch,
        };
        let kv_batch = match (problem.ragged_k, problem.has_rows) {
            (true, _) => [0, 1],
            (_, true) => [0, problem.kv_batch()],
            _ => [part.batch[0] / share, part.batch[1].div_ceil(share)],
        };
        let rows = |width: u64| {
            let q_len = problem.q_len() as u64;
            let row = |b: u32, h: u32| (b as u64 * problem.heads() as u64 + h as u64) * q_len;
            let last = row(batch[1].max(1) - 1, heads[1]);
            ([row(batch[0], heads[0]) * width, last * width], 4)
        };
        let floats = |ix: usize, layout: &Layout, batch, heads| {
            (layout.span(batch, heads), problem.types[ix].size())
        };
        let (span, size) = match name {
            "q" => floats(0, &problem.q, batch, heads),
            "k" => floats(1, &problem.k, kv_batch, part.kv),
            "v" => floats(2, &problem.v, kv_batch, part.kv),
            "o" => floats(3, &problem.out, batch, heads),
            "bias" => {
                let size = problem.bias_type.map_or(4, DType::size);
                (problem.bias?.span(part.batch, heads), size)
            }
            "mask" => (problem.mask?.span(part.batch, heads), 1),
            "weights" | "stage" => rows(problem.k_len() as u64),
            "parts" if self.plan.splits > 1 => {
                rows(self.plan.splits as u64 * (problem.value_dim() as u64 + 2))
            }
            "lse" if problem.wants_lse => rows(1),
            _ => return None,
        };
        if span[0] >= span[1] {
            return None;
        }
        let align = self.caps.storage_align.max(16) as u64;
        let [from, to] = span.map(|at| at * size);
        Some([from / align * align, to.next_multiple_of(4)])
    }

    /// Records a kernel over a part: one launch, or several where one would take too long.
    fn launch(&mut self, part: Part, kernel: Kernel) -> Result<()> {
        let problem = self.problem;
        let tables = self.tables(kernel.uses);
        let names = kernel.buffers.iter().map(|&name| name.into());
        let bindings: Vec<(Arc<str>, Option<[u64; 2]>)> = names
            .chain(tables.into_iter().map(|(name, _)| name))
            .map(|name: Arc<str>| {
                let slice = self.slice(&name, part);
                (name, slice)
            })
            .collect();
        if bindings.len() > self.caps.storage_buffers as usize {
            let names: Vec<&str> = bindings.iter().map(|(name, _)| &**name).collect();
            return Err(Error::refused(
                "the tensors of these options together",
                names.join(", "),
                format!("this device binds {} at once", self.caps.storage_buffers),
            ));
        }
        let groups = match kernel.threads {
            true => kernel.count.div_ceil(THREADS),
            false => kernel.count,
        };
        if groups.max(kernel.count) > u32::MAX as u64 {
            return Err(Error::refused(
                "q",
                format_args!("{groups} workgroups of `{}`", kernel.shader.kernel),
                "they are counted in 32 bits",
            ));
        }
        let mut params = problem.params(self.plan.splits, self.plan.split_len);
        params.b_from = part.batch[0];
        params.kv_from = part.kv[0];
        params.kv_count = part.kv[1] - part.kv[0];
        params.blocks = kernel.blocks as u32;
        params.k_blocks = problem.k_len().div_ceil(32);
        // Offsets count from the slice that is bound, modulo 2^32: b and h stay the problem's own.
        for (name, slice) in &bindings {
            let Some([from, _]) = slice else { continue };
            let base = |size: u64| (from / size) as u32;
            match &**name {
                "q" => params.q_at[0] = params.q_at[0].wrapping_sub(base(problem.types[0].size())),
                "k" => params.k_at[0] = params.k_at[0].wrapping_sub(base(problem.types[1].size())),
                "v" => params.v_at[0] = params.v_at[0].wrapping_sub(base(problem.types[2].size())),
                "o" => params.o_at[0] = params.o_at[0].wrapping_sub(base(problem.types[3].size())),
                "bias" => {
                    let size = problem.bias_type.map_or(4, DType::size);
                    params.bias_from = params.bias_from.wrapping_sub(base(size));
                }
                "mask" => params.mask_from = params.mask_from.wrapping_sub(base(1)),
                "weights" | "stage" | "parts" => params.weights_from = 0u32.wrapping_sub(base(4)),
                "lse" => params.lse_from = 0u32.wrapping_sub(base(4)),
                _ => {}
            }
        }
        let at_once = (WORK / kernel.work.max(1)).max(1);
        let mut from = 0;
        while from < groups {
            let to = groups.min(from + at_once);
            params.block_from = from as u32;
            params.count = match kernel.threads {
                true => kernel.count.min(to * THREADS) as u32,
                false => to as u32,
            };
            self.plan.launches.push(Launch {
                shader: kernel.shader.clone(),
                bindings: bindings.clone(),
                params,
                groups: to - from,
            });
            from = to;
        }
        Ok(())
    }

    /// The optional tensors that a kernel reads: names and element types, in the order of their bindings.
    fn tables(&self, uses: Uses) -> Vec<(Arc<str>, &'static str)> {
        let problem = self.problem;
        let bias = problem.bias_type.map_or("f32", wgsl_type);
        let t5 = problem.t5_buckets > 0;
        let mut tables: Vec<(Arc<str>, &'static str)> = [
            ("cu_q", "u32", problem.ragged_q),
            ("cu_k", "u32", uses.keys && problem.ragged_k),
            ("kv_len", "u32", uses.keys && problem.has_kv_len),
            ("q_offset", "i32", uses.keys && problem.has_q_offset),
            ("prefix_len", "u32", uses.keys && problem.has_prefix),
            ("rows", "u32", uses.rows && problem.has_rows),
            ("bias", bias, uses.scores && problem.bias.is_some()),
            ("mask", "u32", uses.masks && problem.mask.is_some()),
            ("alibi", "f32", uses.scores && problem.has_alibi),
            ("t5", "f32", uses.scores && t5),
            ("sinks", "f32", uses.sinks && problem.has_sinks),
        ]
        .into_iter()
        .filter(|&(_, _, used)| used)
        .map(|(name, element, _)| (name.into(), element))
        .collect();
        if uses.masks {
            let extra = problem.extra.iter();
            tables.extend(extra.map(|(name, dtype)| (name.clone(), wgsl_type(*dtype))));
        }
        tables
    }

    /// A kernel's variant for this problem.
    fn shader(&self, kernel: &'static str, uses: Uses) -> Shader {
        let problem = self.problem;
        let options = &problem.options;
        let [q, k, v, out] = problem.types;
        let [left, right] = problem.window();
        let score_mod = options.score_mod.as_ref().filter(|_| uses.scores);
        let mask_mod = options.mask_mod.as_ref().filter(|_| uses.masks);
        let functions: Vec<&str> = score_mod
            .into_iter()
            .chain(mask_mod)
            .map(|f| &**f)
            .collect();
        let position = match (uses.keys && problem.has_q_offset, options.align) {
            (true, _) => "table",
            (false, super::Align::TopLeft) => "top_left",
            (false, super::Align::BottomRight) => "bottom_right",
        };
        let f16 = problem.types.contains(&DType::F16) || problem.bias_type == Some(DType::F16);
        Shader::new(kernel)
            .with("F16", f16)
            .with("VEC", problem.vec())
            .with("Q_TYPE", q.name())
            .with("K_TYPE", k.name())
            .with("V_TYPE", v.name())
            .with("O_TYPE", out.name())
            .with("BIAS_TYPE", problem.bias_type.map_or("f32", DType::name))
            .with("HAS_KV_LEN", uses.keys && problem.has_kv_len)
            .with("HAS_ROWS", uses.rows && problem.has_rows)
            .with("RAGGED_Q", problem.ragged_q)
            .with("RAGGED_K", uses.keys && problem.ragged_k)
            .with("POSITION", position)
            .with("HAS_LEFT", left.is_some())
            .with("HAS_RIGHT", right.is_some())
            .with("HAS_PREFIX", uses.keys && problem.has_prefix)
            .with("HAS_SOFTCAP", uses.scores && options.softcap.is_some())
            .with("HAS_BIAS", uses.scores && problem.bias.is_some())
            .with("HAS_MASK", uses.masks && problem.mask.is_some())
            .with("HAS_ALIBI", uses.scores && problem.has_alibi)
            .with("HAS_T5", uses.scores && problem.t5_buckets > 0)
            .with("T5_BOTH", options.t5.is_some_and(|t5| t5.bidirectional))
            .with("HAS_SINKS", uses.sinks && problem.has_sinks)
            .with("HAS_SCORE_MOD", score_mod.is_some())
            .with("HAS_MASK_MOD", mask_mod.is_some())
            .with("FUNCTIONS", Arc::<str>::from(functions.join("\n")))
            .with("HAS_LSE", problem.wants_lse)
            .with("SOFTWARE", self.caps.software)
            .with("TABLES", self.tables(uses))
    }
}
