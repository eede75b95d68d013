//! From a kernel over a part of the problem to launches: its variant, what it binds, and its parameters.

use std::sync::Arc;

use super::super::Align;
use super::super::problem::{Layout, Params, Problem, Stage};
use super::{Launch, Plan, THREADS, WORK};
use crate::gpu::{Caps, DType, Shader, wgsl_type};
use crate::{Error, Result};

/// Which of the optional tensors a kernel reads.
#[derive(Clone, Copy, Default)]
pub(super) struct Uses {
    /// Lengths and positions, which bound the keys of a row.
    pub(super) keys: bool,
    /// What changes scores: biases, masks, functions.
    pub(super) scores: bool,
    /// Of these, the masks.
    pub(super) masks: bool,
    /// Histories.
    pub(super) rows: bool,
    pub(super) sinks: bool,
}

/// Batch rows and KV heads that one launch sees.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) batch: [u32; 2],
    pub(super) kv: [u32; 2],
}

pub(super) struct Planner<'a> {
    pub(super) problem: &'a Problem,
    pub(super) caps: &'a Caps,
    /// Whether kernels that bind too much read the small tables from one buffer.
    pub(super) packed: bool,
    /// The bytes of scratch where these lie, and the first word of each among them.
    pub(super) tables: [u64; 2],
    pub(super) tables_from: [u32; 10],
    pub(super) parts: Vec<Part>,
    /// Keys of a tile of the block map.
    pub(super) k_block: u32,
    pub(super) plan: Plan,
}

/// Names and element types of tensors that a kernel reads: those that it binds, and those that it finds
/// among the packed ones.
#[derive(Default)]
pub(super) struct Tables {
    bound: Vec<(Arc<str>, &'static str)>,
    packed: Vec<(Arc<str>, &'static str)>,
}

impl Tables {
    /// How many buffers they take.
    pub(super) fn buffers(&self) -> usize {
        self.bound.len() + usize::from(!self.packed.is_empty())
    }
}

/// One kernel over one part, still in one piece.
pub(super) struct Kernel {
    pub(super) shader: Shader,
    pub(super) buffers: Vec<&'static str>,
    pub(super) uses: Uses,
    /// Workgroups, or threads where these are numbered through.
    pub(super) count: u64,
    pub(super) threads: bool,
    /// Blocks of query rows.
    pub(super) blocks: u64,
    /// Multiply-adds of a workgroup.
    pub(super) work: u64,
}

/// Blocks of `size` rows of one KV head over so many batch rows; at least so many where they are ragged.
pub(super) fn row_blocks(problem: &Problem, batch: u32, size: u32) -> u64 {
    let group = problem.heads() / problem.kv_heads();
    let rows = problem.q_len() as u64 * group as u64;
    match problem.few_queries() {
        Some(few) => batch as u64 * (few as u64 * group as u64).div_ceil(size as u64),
        None if problem.ragged_q => rows / size as u64 + problem.batch as u64,
        None => batch as u64 * rows.div_ceil(size as u64),
    }
}

impl Planner<'_> {
    pub(super) fn group(&self) -> u32 {
        self.problem.heads() / self.problem.kv_heads()
    }

    /// All rows of a part.
    pub(super) fn rows(&self, part: Part) -> u64 {
        let heads = ((part.kv[1] - part.kv[0]) * self.group()) as u64;
        let batch = match self.problem.ragged_q {
            true => 1,
            false => (part.batch[1] - part.batch[0]) as u64,
        };
        batch * heads * self.rows_of_head()
    }

    /// Rows of a head, of one batch row or of all ragged sequences; of short ones as many as these may have.
    fn rows_of_head(&self) -> u64 {
        match self.problem.few_queries() {
            Some(few) => self.problem.batch as u64 * few as u64,
            None => self.problem.q_len() as u64,
        }
    }

    /// Blocks of `size` rows over the batch rows of a part.
    pub(super) fn blocks(&self, part: Part, size: u32) -> u64 {
        row_blocks(self.problem, part.batch[1] - part.batch[0], size)
    }

    pub(super) fn all_rows(&self) -> u64 {
        self.rows(Part {
            batch: [0, self.problem.batch],
            kv: [0, self.problem.kv_heads()],
        })
    }

    pub(super) fn count_in_32_bits(&self, elements: u64) -> Result<()> {
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
    pub(super) fn make_parts(&mut self, names: &[&'static str]) -> Result<()> {
        let problem = self.problem;
        let (batch, kv) = (problem.batch, problem.kv_heads());
        let share = batch / problem.kv_batch();
        let by_batch = |step: u32, heads: u32| {
            (0..batch).step_by(step as usize).flat_map(move |b| {
                (0..kv).step_by(heads as usize).map(move |h| Part {
                    batch: [b, b + step],
                    kv: [h, h + heads],
                })
            })
        };
        // Batch rows and KV heads of a part, from the whole on.
        let choices = match problem.ragged_q || problem.ragged_k {
            true => vec![[batch, kv], [batch, 1]],
            false => vec![[batch, kv], [share, kv], [share, 1]],
        };
        let mut names = names.to_vec();
        names.extend(["bias", "mask"]);
        let mut too_large = None;
        for [step, heads] in choices {
            let parts: Vec<Part> = by_batch(step, heads).collect();
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
        let shared = matches!(name, "k" | "v");
        let of = match () {
            () if shared && problem.pages.is_some() => "the whole pool",
            () if problem.ragged_q || problem.ragged_k => "all sequences",
            () if shared && problem.has_rows => "all batch rows",
            () => "one batch row",
        };
        Err(Error::refused(
            name,
            format_args!("{bytes} bytes for one head of {of}"),
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
        let kv_batch = match (
            problem.ragged_k,
            problem.has_rows || problem.pages.is_some(),
        ) {
            (true, _) => [0, 1],
            (_, true) => [0, problem.k.extents[0]],
            _ => [part.batch[0] / share, part.batch[1].div_ceil(share)],
        };
        let rows = |width: u64, of_head: u64| {
            let row = |b: u32, h: u32| (b as u64 * problem.heads() as u64 + h as u64) * of_head;
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
            "weights" | "stage" => rows(problem.k_len() as u64, problem.q_len() as u64),
            "parts" if self.plan.splits > 1 => {
                let width = self.plan.splits as u64 * (problem.value_dim() as u64 + 2);
                rows(width, self.rows_of_head())
            }
            "lse" if problem.wants_lse => rows(1, problem.q_len() as u64),
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
    pub(super) fn launch(&mut self, part: Part, kernel: Kernel) -> Result<()> {
        let problem = self.problem;
        let tables = self.tables(kernel.buffers.len(), kernel.uses);
        let packed = (!tables.packed.is_empty()).then_some("tables");
        let bound = tables.bound.iter().map(|(name, _)| name.clone());
        let names = kernel.buffers.iter().map(|&name| name.into());
        let bindings: Vec<(Arc<str>, Option<[u64; 2]>)> = names
            .chain(bound)
            .chain(packed.map(Into::into))
            .map(|name: Arc<str>| {
                let slice = self.slice(&name, part).or(self.scratch_slice(&name));
                (name, slice)
            })
            .collect();
        let shader = kernel.shader.with("TABLES", tables.bound);
        let shader = shader.with("PACKED", tables.packed);
        let groups = match kernel.threads {
            true => kernel.count.div_ceil(THREADS),
            false => kernel.count,
        };
        if groups.max(kernel.count) > u32::MAX as u64 {
            return Err(Error::refused(
                "q",
                format_args!("{groups} workgroups of `{}`", shader.kernel),
                "they are counted in 32 bits",
            ));
        }
        let mut params = problem.params(self.plan.splits, self.plan.split_len);
        params.b_from = part.batch[0];
        params.kv_from = part.kv[0];
        params.kv_count = part.kv[1] - part.kv[0];
        params.blocks = kernel.blocks as u32;
        params.k_blocks = problem.k_len().div_ceil(self.k_block);
        params.tables_from = self.tables_from;
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
                shader: shader.clone(),
                bindings: bindings.clone(),
                params,
                groups: to - from,
            });
            from = to;
        }
        Ok(())
    }

    /// What of scratch a name stands for that the part of the problem does not narrow: all that the plan takes but
    /// the packed tables, since no two bindings may overlap where one is written.
    fn scratch_slice(&self, name: &str) -> Option<[u64; 2]> {
        let [from, to] = self.tables;
        let others = match from == to {
            true => self.plan.scratch * 4,
            false => from,
        };
        let problem = self.problem;
        let weights = !problem.wants_weights || problem.options.stage != Stage::Softmax;
        match name {
            "tables" => Some([from, to]),
            "parts" | "block_map" => Some([0, others]),
            "weights" if weights => Some([0, others]),
            _ => None,
        }
    }

    /// Finds the small tables a place behind what else lies in scratch, and records their copying there.
    pub(super) fn pack_tables(&mut self) {
        if !self.packed {
            return;
        }
        let words = u64::from(self.caps.storage_align.max(16) / 4);
        let first = self.plan.scratch.max(1).next_multiple_of(words);
        let mut at = first;
        let tables = self.problem.words_of_tables();
        for (ix, (name, n)) in tables.into_iter().enumerate() {
            if n == 0 {
                continue;
            }
            let bytes = [at * 4, (at + n) * 4];
            self.tables_from[ix] = (at - first) as u32;
            self.plan.launches.push(Launch {
                shader: Shader::new("pack"),
                bindings: vec![
                    (name.into(), Some([0, n * 4])),
                    ("tables".into(), Some(bytes)),
                ],
                params: Params {
                    count: n as u32,
                    ..Params::default()
                },
                groups: n.div_ceil(THREADS),
            });
            self.tables = [first * 4, bytes[1]];
            at = (at + n).next_multiple_of(words);
        }
        self.plan.scratch = self.plan.scratch.max(self.tables[1] / 4);
    }

    /// The optional tensors that a kernel reads beside `buffers` others, in the order of their bindings.
    pub(super) fn tables(&self, buffers: usize, uses: Uses) -> Tables {
        let problem = self.problem;
        let bias = problem.bias_type.map_or("f32", wgsl_type);
        let t5 = problem.t5_buckets > 0;
        let mut bound: Vec<(Arc<str>, &'static str)> = [
            ("cu_q", "u32", problem.ragged_q),
            ("cu_k", "u32", uses.keys && problem.ragged_k),
            ("kv_len", "u32", uses.keys && problem.has_kv_len),
            ("q_offset", "i32", uses.keys && problem.has_q_offset),
            ("prefix_len", "u32", uses.keys && problem.has_prefix),
            ("rows", "u32", uses.rows && problem.has_rows),
            ("pages", "u32", uses.rows && problem.pages.is_some()),
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
            bound.extend(extra.map(|(name, dtype)| (name.clone(), wgsl_type(*dtype))));
        }
        let mut packed = Vec::new();
        if self.packed && buffers + bound.len() > self.caps.storage_buffers as usize {
            // Biases and masks are no small tables; the caller's WGSL calls its buffers by their names.
            let small = problem.words_of_tables().map(|(name, _)| name);
            (packed, bound) = bound
                .into_iter()
                .partition(|(name, _)| small.contains(&&**name));
        }
        Tables { bound, packed }
    }

    /// A kernel's variant for this problem.
    pub(super) fn shader(&self, kernel: &'static str, uses: Uses) -> Shader {
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
            (false, Align::TopLeft) => "top_left",
            (false, Align::BottomRight) => "bottom_right",
        };
        // Keys of a page; 0 where there are none.
        let page = match problem.pages {
            Some(_) if uses.rows => problem.k.extents[2],
            _ => 0,
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
            .with("PAGE", page)
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
    }
}
