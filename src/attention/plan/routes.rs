//! The kernels of each route.

use super::super::problem::Stage;
use super::coop::{self, Coop};
use super::launch::{Kernel, Part, Planner, Uses};
use super::{
    INVARIANT_SPLIT, Subgroups, THREADS, by_lanes, few_registers, prefill_keys, turns_left,
};
use crate::{Error, Result};

impl Planner<'_> {
    pub(super) fn three_pass(&mut self) -> Result<()> {
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
        let most = 4 * turns_left(problem);
        if self.caps.software && k_len > most {
            return Err(Error::refused(
                "k",
                format_args!("{k_len} rows"),
                format!("at most {most} on the three-pass route: this driver cuts longer loops"),
            ));
        }
        self.make_parts(&["q", "k", "v", "o", "weights", "lse"])?;
        self.pack_tables();
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

    pub(super) fn prefill(&mut self) -> Result<()> {
        let problem = self.problem;
        let (head_dim, dv) = (problem.head_dim(), problem.value_dim());
        let candidate = self.plan.candidate;
        let lanes = candidate.lanes(self.caps);
        let coop =
            Coop::new(problem, self.caps).filter(|_| candidate.subgroups == Subgroups::Matrices);
        // Query rows of a workgroup, and keys of a tile.
        let (block_q, block_k) = match (coop, lanes) {
            (Some(coop), _) => (coop.block_q(), coop::BLOCK_K),
            (_, Some(lanes)) => (candidate.rows, 4 * lanes),
            _ => (32, 32),
        };
        // Value columns of a chunk, of which a workgroup has up to four.
        let columns = block_k;
        let chunks = dv.div_ceil(columns).min(4);
        // Value columns of a workgroup.
        let share = coop.map_or(chunks * columns, |coop| coop.columns());
        self.make_parts(&["q", "k", "v", "o", "lse"])?;
        if problem.k_len() as u64 > prefill_keys(problem, self.caps, candidate) {
            return Err(Error::refused(
                "k",
                format_args!("{} rows", problem.k_len()),
                "fewer on the prefill route: this driver cuts longer loops",
            ));
        }
        let by_element = problem.mask.is_some() || problem.options.mask_mod.is_some();
        self.k_block = block_k;
        let k_blocks = problem.k_len().div_ceil(block_k) as u64;
        let uses = Uses {
            keys: true,
            scores: true,
            masks: true,
            rows: true,
            sinks: true,
        };
        let mut buffers = vec!["q", "k", "v", "o"];
        buffers.extend(problem.wants_lse.then_some("lse"));
        // The map saves work and no more: it goes before an option does.
        let with_map = buffers.len() + 1;
        let may_map = by_element
            && problem.q_len() >= 64
            && problem.k_len() >= 64
            && !(self.packed
                && with_map + self.tables(with_map, uses).buffers()
                    > self.caps.storage_buffers as usize);
        let tiles = |planner: &Self, part: Part| {
            let kv = (part.kv[1] - part.kv[0]) as u64;
            let tiles = kv * planner.blocks(part, block_q) * k_blocks;
            (may_map && tiles * 4 <= planner.caps.max_binding).then_some(tiles)
        };
        let parts = self.parts.clone();
        let most = parts.iter().filter_map(|&part| tiles(self, part)).max();
        self.plan.scratch = most.unwrap_or(0);
        self.pack_tables();
        for part in parts {
            let kv = (part.kv[1] - part.kv[0]) as u64;
            let blocks = self.blocks(part, block_q);
            let map = tiles(self, part);
            if let Some(tiles) = map {
                let uses = Uses {
                    keys: true,
                    masks: true,
                    ..Uses::default()
                };
                self.launch(
                    part,
                    Kernel {
                        shader: self
                            .shader("block_map", uses)
                            .with("BLOCK_Q", block_q)
                            .with("BLOCK_K", block_k),
                        buffers: vec!["block_map"],
                        uses,
                        count: tiles,
                        threads: false,
                        blocks,
                        work: 1024,
                    },
                )?;
            }
            let mut buffers = buffers.clone();
            buffers.extend(map.map(|_| "block_map"));
            let shader = match (coop, lanes) {
                (Some(coop), _) => coop
                    .form
                    .constants(self.shader("prefill_coop", uses))
                    .with("TILES", coop.tiles())
                    .with("BLOCK_K", block_k)
                    .with("D_TILES", coop.d_tiles)
                    .with("V_TILES", coop.v_tiles),
                (_, Some(lanes)) => self
                    .shader("prefill_lanes", uses)
                    .with("ROWS", block_q)
                    .with("LANES", lanes)
                    .with("V_WHOLE", dv.is_multiple_of(share))
                    .with("V_CHUNKS", chunks),
                _ => self
                    .shader("prefill", uses)
                    .with("ROWS", candidate.rows)
                    .with("F16_MATH", candidate.f16_math)
                    .with("SUBGROUPS", candidate.subgroups == Subgroups::Maxima)
                    .with("FEW_REGISTERS", few_registers(self.caps))
                    .with("V_CHUNKS", chunks),
            };
            self.launch(
                part,
                Kernel {
                    shader: shader.with("HAS_BLOCK_MAP", map.is_some()),
                    buffers,
                    uses,
                    count: kv * blocks * dv.div_ceil(share) as u64,
                    threads: false,
                    blocks,
                    work: block_q as u64 * problem.k_len() as u64 * (head_dim + share) as u64,
                },
            )?;
        }
        Ok(())
    }

    pub(super) fn decode(&mut self) -> Result<()> {
        let problem = self.problem;
        let invariant = problem.options.batch_invariant;
        let (k_len, dv) = (problem.k_len(), problem.value_dim());
        let quads = problem.head_dim().div_ceil(4);
        let v_quads = dv.div_ceil(4);
        let candidate = self.plan.candidate;
        let lanes = candidate.lanes(self.caps);
        let (at_once, keys) = (candidate.rows, candidate.keys);
        let split_len = match (problem.options.splits, invariant) {
            (None, true) => INVARIANT_SPLIT,
            _ => k_len.div_ceil(candidate.splits),
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
            true => (turns_left(problem) / turns as u64 * 256) as u32,
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
            // Without rows there is still a buffer to bind.
            let rows = self.all_rows().max(1);
            self.plan.scratch = rows * self.plan.splits as u64 * (dv as u64 + 2);
        }
        self.count_in_32_bits(self.plan.scratch)?;
        self.make_parts(&["q", "k", "v", "o", "parts", "lse"])?;
        self.pack_tables();
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
                    .with("FEW_REGISTERS", few_registers(self.caps))
                    .with("Q_BY_LANES", by_lanes(self.caps))
                    .with("CHUNKS", v_quads.div_ceil(lanes))
                    .with("V_WHOLE", dv.is_multiple_of(4 * lanes)),
                None => {
                    let chunks = v_quads.div_ceil(64);
                    let columns = v_quads.div_ceil(chunks);
                    base("decode")
                        .with("COLUMNS", columns)
                        .with("SLICES", 64 / columns)
                        .with("CHUNKS", chunks)
                        .with("V_WHOLE", dv.is_multiple_of(4 * columns * chunks))
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
}
