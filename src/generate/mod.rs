//! Generation, a step at a time: greedy, by chance, by beam search, and from drafts.

mod batch;
mod beam;
mod causal;
mod draft;
mod greedy;
mod settings;
mod speculative;

pub use batch::{Batch, BatchSettings, Event, RequestId};
pub use causal::{CausalGenerator, CausalSettings};
pub use draft::{Drafter, ModelDrafter, Ngram};
pub use settings::{CausalWishes, EarlyStopping, MAX_BEAMS, Settings};
pub use speculative::{DraftCounts, Speculative};

use crate::cache::{Cache, Extents};
use crate::gpu::{DType, Recorder, Recording, Tensor};
use crate::model::{Memory, Model};
use crate::ops::{self, Choice};
use crate::{Error, Result};
use beam::{Rules, Search};

/// One decoder step.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The token written for each source; none where it had ended. With beams, that of the leading one.
    pub tokens: Vec<Option<u32>>,
}

/// What was written for one source.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// The tokens, the end token included where there is one.
    pub tokens: Vec<u32>,
    /// Greedy: the sum of log-probabilities. Beams: that sum over length ^ penalty.
    pub score: f32,
}

/// Writes targets for a batch of sources, one token a step: an iterator of [`Step`]. Everything that a
/// step needs is made before the first; a step is one encoder, one submission and a few bytes back.
pub struct Generator<'m> {
    model: &'m Model,
    settings: Settings,
    sources: usize,
    step: Recording,
    ids: Tensor,
    parents: Option<Tensor>,
    staging: Tensor,
    steps: u32,
    state: State,
    failed: bool,
}

enum State {
    Greedy(Vec<Option<Sequence>>, Vec<Sequence>),
    Beams(Vec<Search>),
}

impl<'m> Generator<'m> {
    /// Prepares generation from a batch's memory.
    ///
    /// # Errors
    /// [`Error::Refused`] for settings that the model cannot follow, [`Error::OutOfMemory`] where the
    /// cache does not fit.
    pub fn new(model: &'m Model, memory: &Memory, settings: &Settings) -> Result<Self> {
        let (gpu, spec) = (model.gpu(), model.spec());
        settings.check(spec.target_vocab, spec.max_positions)?;
        let (beams, sources) = (settings.beams, memory.sources);
        let rows = sources * beams;
        let extents = Extents {
            layers: spec.decoder.layers,
            rows,
            kv_heads: spec.decoder.heads,
            capacity: settings.max_tokens,
            head_dim: spec.width / spec.decoder.heads,
        };
        let cache = Cache::new(gpu, [model.dtype(); 2], extents, beams > 1)?;
        let ids = gpu.upload_u32("ids", &[rows], &vec![settings.start; rows as usize])?;
        let logits = gpu.empty("logits", DType::F32, &[rows, spec.target_vocab])?;
        let chosen = gpu.empty("chosen", DType::U32, &[rows, settings.candidates(), 2])?;
        let allowed = allowed(settings, spec.target_vocab);
        let allowed = gpu.upload_u32("allowed", &[2, allowed.len() as u32 / 2], &allowed)?;
        let staging = gpu.staging(chosen.len() * 4)?;

        let mut recorder = Recorder::new(gpu);
        let mut parents = None;
        if let Some(rows_of) = &cache.rows {
            let own: Vec<u32> = (0..rows).map(|row| row % beams).collect();
            let tensor = gpu.upload_u32("parents", &[rows], &own)?;
            ops::reorder(&mut recorder, &tensor, &cache.lengths, rows_of, beams)?;
            parents = Some(tensor);
        }
        model.record_step(&mut recorder, memory, &cache, &ids, &logits)?;
        let choice = Choice {
            logits: &logits,
            allowed: &allowed,
            lengths: &cache.lengths,
            chosen: &chosen,
            ids: &ids,
            renormalize: settings.renormalize,
        };
        ops::choose(&mut recorder, choice)?;
        recorder.copy(&chosen, staging.buffer(), 0);
        let state = match beams {
            1 => {
                let nothing = Sequence {
                    tokens: Vec::new(),
                    score: 0.0,
                };
                State::Greedy(
                    vec![None; sources as usize],
                    vec![nothing; sources as usize],
                )
            }
            beams => State::Beams((0..sources).map(|_| Search::new(beams as usize)).collect()),
        };
        Ok(Generator {
            model,
            settings: settings.clone(),
            sources: sources as usize,
            step: recorder.finish()?,
            ids,
            parents,
            staging,
            steps: 0,
            state,
            failed: false,
        })
    }

    /// Decoder steps taken so far.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// Whether every source has its target.
    pub fn done(&self) -> bool {
        self.failed
            || match &self.state {
                State::Greedy(ended, _) => ended.iter().all(Option::is_some),
                State::Beams(searches) => searches.iter().all(Search::over),
            }
    }

    /// What is written so far, or in the end, for each source.
    pub fn sequences(&self) -> Vec<Sequence> {
        match &self.state {
            State::Greedy(_, running) => running.clone(),
            State::Beams(searches) => searches
                .iter()
                .map(|search| {
                    let best = search.best();
                    Sequence {
                        tokens: best.tokens.clone(),
                        score: best.score,
                    }
                })
                .collect(),
        }
    }

    fn advance(&mut self) -> Result<Step> {
        let n = self.settings.candidates() as usize;
        let vocab = self.model.spec().target_vocab;
        let rows = self.sources * self.settings.beams as usize;
        let mut candidates = self
            .model
            .gpu()
            .run_and_read(&self.step, &self.staging, |bytes| {
                let mut rows_of = read_choices(bytes, n, vocab);
                rows_of.truncate(rows);
                rows_of
            })?;
        self.steps += 1;
        if let Some(row) = candidates
            .iter()
            .position(|row| row.is_empty() || row.iter().any(|(_, p)| !p.is_finite()))
        {
            return Err(Error::Device(format!(
                "decoder step {}: the logits of sequence {row} are not finite, or no token is allowed",
                self.steps
            )));
        }
        let last = self.steps >= self.settings.max_tokens;
        // A forced token is certain: it adds nothing to a score.
        let forced = match (self.steps, last) {
            (_, true) if self.settings.forced_eos.is_some() => self.settings.forced_eos,
            (1, _) => self.settings.forced_bos,
            _ => None,
        };
        if let Some(token) = forced {
            candidates
                .iter_mut()
                .for_each(|row| *row = vec![(token, 0.0)]);
        }
        let (settings, gpu) = (&self.settings, self.model.gpu());
        if !settings.bad_words.is_empty() {
            for (row, tokens) in candidates.iter_mut().enumerate() {
                let beams = settings.beams as usize;
                let written = match &self.state {
                    State::Greedy(_, running) => &running[row].tokens,
                    State::Beams(searches) => searches[row / beams].written(row % beams),
                };
                tokens
                    .retain(|&(token, _)| forced == Some(token) || !settings.bans(written, token));
                if tokens.is_empty() {
                    let step = self.steps;
                    let what =
                        format!("decoder step {step}: every token of sequence {row} is banned");
                    return Err(Error::Device(what));
                }
            }
        }
        match &mut self.state {
            State::Greedy(ended, running) => {
                if !settings.bad_words.is_empty() {
                    // The device has gone on with its first choice, which may be banned.
                    let ids: Vec<u32> = candidates.iter().map(|row| row[0].0).collect();
                    gpu.write(&self.ids, bytemuck::cast_slice(&ids))?;
                }
                let mut tokens = Vec::with_capacity(running.len());
                for ((ended, sequence), row) in ended.iter_mut().zip(running).zip(&candidates) {
                    if ended.is_some() {
                        tokens.push(None);
                        continue;
                    }
                    let (token, logprob) = row[0];
                    sequence.tokens.push(token);
                    sequence.score += logprob;
                    if last || settings.eos.contains(&token) {
                        *ended = Some(sequence.clone());
                    }
                    tokens.push(Some(token));
                }
                Ok(Step { tokens })
            }
            State::Beams(searches) => {
                let beams = settings.beams as usize;
                let rules = Rules {
                    beams,
                    eos: &settings.eos,
                    max_tokens: settings.max_tokens as usize,
                    length_penalty: settings.length_penalty,
                    early_stopping: settings.early_stopping,
                };
                let mut tokens = Vec::with_capacity(searches.len());
                let mut ids = vec![settings.start; candidates.len()];
                let mut parents: Vec<u32> = (0..candidates.len())
                    .map(|row| (row % beams) as u32)
                    .collect();
                for (ix, search) in searches.iter_mut().enumerate() {
                    let rows = ix * beams..(ix + 1) * beams;
                    let moves = search.advance(&candidates[rows.clone()], &rules);
                    for (row, step) in rows.zip(&moves) {
                        (ids[row], parents[row]) = (step.token, step.parent);
                    }
                    tokens.push(moves.first().map(|step| step.token));
                }
                gpu.write(&self.ids, bytemuck::cast_slice(&ids))?;
                if let Some(tensor) = &self.parents {
                    gpu.write(tensor, bytemuck::cast_slice(&parents))?;
                }
                Ok(Step { tokens })
            }
        }
    }
}

impl Iterator for Generator<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Result<Step>> {
        if self.done() {
            return None;
        }
        let step = self.advance();
        self.failed = step.is_err();
        Some(step)
    }
}

/// What `choose` wrote for each row, `n` tokens and their log-probabilities, without those that stand for
/// none.
fn read_choices(bytes: &[u8], n: usize, vocab: u32) -> Vec<Vec<(u32, f32)>> {
    let (pairs, _) = bytes.as_chunks::<8>();
    let pair = |&[a, b, c, d, e, f, g, h]: &[u8; 8]| {
        let token = u32::from_le_bytes([a, b, c, d]);
        (token, f32::from_le_bytes([e, f, g, h]))
    };
    let rows = pairs.chunks(n).map(|row| row.iter().map(pair));
    rows.map(|row| row.filter(|&(token, _)| token < vocab).collect())
        .collect()
}

/// A bit for each token that may be written: first the first token's, then those of later ones.
fn allowed(settings: &Settings, vocab: u32) -> Vec<u32> {
    let words = vocab.div_ceil(32) as usize;
    let mut bits = vec![u32::MAX; 2 * words];
    let (first, later) = bits.split_at_mut(words);
    let clear = |bits: &mut [u32], id: u32| bits[id as usize / 32] &= !(1 << (id % 32));
    for &id in &settings.suppressed {
        clear(first, id);
        clear(later, id);
    }
    for &id in &settings.begin_suppressed {
        clear(first, id);
    }
    if let Some(id) = settings.forced_bos {
        first.fill(0);
        first[id as usize / 32] |= 1 << (id % 32);
    }
    bits
}
