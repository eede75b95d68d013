//! Greedy steps over a few branches of one text in pages.

use super::read_choices;
use crate::Result;
use crate::cache::{PagedCache, SequenceId};
use crate::gpu::{DType, Recorder, Tensor};
use crate::model::CausalModel;
use crate::ops::{self, Choice};

/// Positions of a page.
const PAGE: u32 = 16;

/// After which of a step's tokens the likeliest next ones are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Logits {
    /// After all.
    All,
    /// After each branch's last.
    Last,
}

/// A model with its pages, and what a step needs beside them.
pub(super) struct Greedy<'m> {
    model: &'m CausalModel,
    pub cache: PagedCache,
    positions: u32,
    logits: Tensor,
    allowed: Tensor,
    /// Counted by `choose`, and used by no one.
    lengths: Tensor,
    /// u32 `[most rows, candidates, 2]`
    chosen: Tensor,
    ids: Tensor,
    staging: Tensor,
}

impl<'m> Greedy<'m> {
    /// Room for one text of `positions` with `branches` that reach `tokens` beyond what they share, and for that
    /// many `rows` of logits a step, of each of which the `candidates` likeliest tokens are told.
    pub fn new(
        model: &'m CausalModel,
        types: [DType; 2],
        positions: u32,
        [branches, tokens]: [u32; 2],
        [rows, candidates]: [u32; 2],
    ) -> Result<Self> {
        let (gpu, vocab) = (model.gpu(), model.spec().vocab);
        // The branches' own pages, the first of them a copy of one that is shared.
        let own = tokens.div_ceil(PAGE) + 1;
        let pages = positions.div_ceil(PAGE) + branches * own;
        let words = vocab.div_ceil(32);
        let all = vec![u32::MAX; 2 * words as usize];
        let candidates = candidates.min(vocab);
        Ok(Greedy {
            cache: model.paged_cache(types, pages, PAGE)?,
            positions,
            logits: gpu.empty("logits", DType::F32, &[rows, vocab])?,
            allowed: gpu.upload_u32("allowed", &[2, words], &all)?,
            lengths: gpu.empty("lengths", DType::U32, &[rows])?,
            chosen: gpu.empty("chosen", DType::U32, &[rows, candidates, 2])?,
            ids: gpu.empty("ids", DType::U32, &[rows])?,
            staging: gpu.staging(u64::from(rows * candidates) * 8)?,
            model,
        })
    }

    /// The longest text.
    pub fn positions(&self) -> u32 {
        self.positions
    }

    /// Appends tokens to branches; the answer has the likeliest next ones, each with its log-probability, after all of
    /// these tokens in turn or after each branch's last. One submission.
    pub fn step(
        &mut self,
        new: &[(SequenceId, &[u32])],
        wanted: Logits,
    ) -> Result<Vec<Vec<(u32, f32)>>> {
        let (gpu, vocab) = (self.model.gpu(), self.model.spec().vocab);
        let mut recorder = Recorder::new(gpu);
        let mut counts = Vec::with_capacity(new.len());
        for &(id, tokens) in new {
            self.cache.append(&mut recorder, id, tokens)?;
            counts.push((id, tokens.len() as u32));
        }
        let step = self.model.paged_step(&self.cache, &counts)?;
        let (step, rows) = match wanted {
            Logits::All => (step.of_all(), counts.iter().map(|&(_, n)| n).sum()),
            Logits::Last => (step, counts.len() as u32),
        };
        let candidates = self.chosen.shape()[1];
        let logits = self.logits.reshape_prefix(&[rows, vocab]);
        let chosen = self.chosen.reshape_prefix(&[rows, candidates, 2]);
        self.model
            .record_paged_step(&mut recorder, &self.cache, &step, &logits)?;
        let choice = Choice {
            logits: &logits,
            allowed: &self.allowed,
            lengths: &self.lengths,
            chosen: &chosen,
            ids: &self.ids,
            renormalize: false,
        };
        ops::choose(&mut recorder, choice)?;
        recorder.copy(&chosen, self.staging.buffer(), 0);
        let recording = recorder.finish()?;
        let read = |bytes: &[u8]| read_choices(bytes, candidates as usize, vocab);
        let mut choices = gpu.run_and_read(&recording, &self.staging, read)?;
        choices.truncate(rows as usize);
        Ok(choices)
    }
}
