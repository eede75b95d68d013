//! Generation by decoder-only models, a step at a time, greedily or by chance.

use super::{Sequence, Step, read_choices};
use crate::gpu::{DType, Recorder, Recording, Tensor};
use crate::model::{CausalModel, Chunk, Padded, RopeScaling, Wanted};
use crate::ops::{self, Choice, Draw, Sampling};
use crate::{Error, Result};

/// How decoder-only models go on.
#[derive(Clone, Debug, PartialEq)]
pub struct CausalSettings {
    /// The most tokens to write for each prompt, the end token included.
    pub max_tokens: u32,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// How tokens are chosen; [`Sampling::GREEDY`] for the likeliest.
    pub sampling: Sampling,
    /// Prompt r of a [`CausalGenerator`] draws by `seed` + r, a request of a [`super::Batch`] by `seed`, and by its own
    /// length alone: in another's place or in a batch of its own it writes the same with that seed.
    pub seed: u64,
}

impl CausalSettings {
    /// Always the likeliest token.
    pub fn greedy(max_tokens: u32, eos: Vec<u32>) -> CausalSettings {
        CausalSettings {
            max_tokens,
            eos,
            sampling: Sampling::GREEDY,
            seed: 0,
        }
    }

    /// An error for what no model of so many tokens can go by.
    pub(super) fn check(&self, vocab: u32) -> Result<()> {
        if let Some(id) = self.eos.iter().find(|&&id| id >= vocab) {
            let bound = format!("below the vocabulary's {vocab}");
            return Err(Error::refused("an end token", id, bound));
        }
        if self.max_tokens == 0 {
            return Err(Error::refused("max_tokens", 0, "at least 1"));
        }
        self.sampling.check()
    }
}

/// A bit for each token of each text. `[texts, V / 32 rounded up]`
pub(super) fn seen<T: AsRef<[u32]>>(texts: &[T], vocab: u32) -> Vec<u32> {
    let words = vocab.div_ceil(32) as usize;
    let mut bits = vec![0; texts.len() * words];
    for (row, text) in bits.chunks_mut(words).zip(texts) {
        for &token in text.as_ref() {
            row[token as usize / 32] |= 1 << (token % 32);
        }
    }
    bits
}

/// An error for a model whose rotary base grows with the context: what it writes depends on how much room there is.
pub(super) fn refuse_growing(model: &CausalModel) -> Result<()> {
    match model.spec().rope.scaling {
        RopeScaling::Dynamic { .. } => {
            let bound = "one that does not grow with the context, for drafts";
            Err(Error::refused("the rotary base", "dynamic", bound))
        }
        _ => Ok(()),
    }
}

/// An error for a cache of more positions than a rotary base that grows with the context was trained on: all its keys
/// would be turned as in the longest context, while transformers turns each as in the context that it came in.
pub(super) fn refuse_grown(model: &CausalModel, what: &str, positions: u64) -> Result<()> {
    let spec = model.spec();
    let steady = spec.steady_positions();
    match steady < spec.max_positions && positions > u64::from(steady) {
        true => {
            let bound = format!("at most {steady}, as the rotary base grows with longer contexts");
            Err(Error::refused(what, positions, bound))
        }
        false => Ok(()),
    }
}

/// Goes on with a batch of prompts, one token a step: an iterator of [`Step`]. The first step reads the
/// prompts whole; what the others need is made before it, so that each is one encoder, one submission and a
/// few bytes back.
pub struct CausalGenerator<'m> {
    model: &'m CausalModel,
    settings: CausalSettings,
    /// The first step, until it is taken.
    prompts: Option<Recording>,
    step: Recording,
    staging: Tensor,
    cache_bytes: u64,
    steps: u32,
    ended: Vec<bool>,
    sequences: Vec<Sequence>,
    failed: bool,
}

impl<'m> CausalGenerator<'m> {
    /// Prepares to go on with prompts of one length or of several; keys and values are stored as activations are.
    ///
    /// # Errors
    /// [`Error::Refused`] for no prompts, an empty one, tokens outside the vocabulary, and prompts that leave
    /// no room for `max_tokens` within the model's positions, or within those where its rotary base begins to grow;
    /// [`Error::OutOfMemory`] where the cache does not fit.
    pub fn new<R: AsRef<[u32]>>(
        model: &'m CausalModel,
        prompts: &[R],
        settings: &CausalSettings,
    ) -> Result<Self> {
        CausalGenerator::with_cache(model, prompts, settings, [model.dtype(); 2])
    }

    /// As [`CausalGenerator::new`], with keys and values stored as `types` says.
    ///
    /// # Errors
    /// As [`CausalGenerator::new`]; [`Error::Refused`] for types that the model's heads do not fit.
    pub fn with_cache<R: AsRef<[u32]>>(
        model: &'m CausalModel,
        prompts: &[R],
        settings: &CausalSettings,
        types: [DType; 2],
    ) -> Result<Self> {
        let (gpu, spec) = (model.gpu(), model.spec());
        settings.check(spec.vocab)?;
        let padded = Padded::new(prompts, 0);
        let room = spec.max_positions.saturating_sub(padded.len) as u64 + 1;
        if settings.max_tokens as u64 > room {
            let (most, longest) = (spec.max_positions, padded.len);
            let bound = format!(
                "within the model's {most} positions behind the longest prompt's {longest}"
            );
            return Err(Error::refused("max_tokens", settings.max_tokens, bound));
        }
        let n = padded.lengths.len() as u32;
        let chunk = model.chunk(&padded, &vec![0; n as usize], Wanted::Last)?;
        // The last token is written nowhere.
        let capacity = padded.len + settings.max_tokens - 1;
        refuse_grown(model, "the longest prompt and max_tokens", capacity.into())?;
        let cache = model.cache(types, n, capacity)?;
        gpu.write(&cache.lengths, bytemuck::cast_slice(&padded.lengths))?;
        let ids = gpu.empty("ids", DType::U32, &[n])?;
        let logits = gpu.empty("logits", DType::F32, &[n, spec.vocab])?;
        let chosen = gpu.empty("chosen", DType::U32, &[n, 1, 2])?;
        let words = spec.vocab.div_ceil(32);
        let Sampling {
            repeat_penalty,
            temperature,
            top_k,
            top_p,
            ..
        } = settings.sampling;
        // The plain kernel finds the likeliest of logits as they are.
        let chance = temperature > 0.0 || repeat_penalty != 1.0;
        let bits = match chance {
            true => gpu.upload_u32("seen", &[n, words], &seen(prompts, spec.vocab))?,
            false => {
                let all = vec![u32::MAX; 2 * words as usize];
                gpu.upload_u32("allowed", &[2, words], &all)?
            }
        };
        let seeds = (0..u64::from(n)).map(|row| settings.seed.wrapping_add(row));
        let rules: Vec<u32> = seeds
            .flat_map(|seed| settings.sampling.rules(seed))
            .collect();
        let rules = gpu.upload_u32("rules", &[n, 8], &rules)?;
        let staging = gpu.staging(chosen.len() * 4)?;
        let record = |chunk: &Chunk| -> Result<Recording> {
            let mut recorder = Recorder::new(gpu);
            model.record_step(&mut recorder, &cache, chunk, &logits)?;
            if chance {
                let draw = Draw {
                    logits: &logits,
                    rules: &rules,
                    seen: &bits,
                    lengths: &cache.lengths,
                    chosen: &chosen,
                    ids: &ids,
                    top_k: top_k > 0,
                    top_p: top_p < 1.0,
                };
                ops::sample(&mut recorder, draw)?;
            } else {
                let choice = Choice {
                    logits: &logits,
                    allowed: &bits,
                    lengths: &cache.lengths,
                    chosen: &chosen,
                    ids: &ids,
                    renormalize: false,
                };
                ops::choose(&mut recorder, choice)?;
            }
            recorder.copy(&chosen, staging.buffer(), 0);
            recorder.finish()
        };
        Ok(CausalGenerator {
            prompts: Some(record(&chunk)?),
            step: record(&Chunk::one(&ids))?,
            model,
            settings: settings.clone(),
            staging,
            cache_bytes: cache.bytes(),
            steps: 0,
            ended: vec![false; n as usize],
            sequences: vec![
                Sequence {
                    tokens: Vec::new(),
                    score: 0.0,
                };
                n as usize
            ],
            failed: false,
        })
    }

    /// Steps taken so far, that over the prompts included.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// Bytes of the keys and values on the device.
    pub fn cache_bytes(&self) -> u64 {
        self.cache_bytes
    }

    /// Whether every text has ended.
    pub fn done(&self) -> bool {
        self.failed || self.ended.iter().all(|&ended| ended)
    }

    /// What is written so far behind each prompt; the score is the sum of log-probabilities.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    fn advance(&mut self) -> Result<Step> {
        let (gpu, vocab) = (self.model.gpu(), self.model.spec().vocab);
        let prompts = self.prompts.take();
        let recording = prompts.as_ref().unwrap_or(&self.step);
        let read = |bytes: &[u8]| read_choices(bytes, 1, vocab);
        let chosen = gpu.run_and_read(recording, &self.staging, read)?;
        self.steps += 1;
        let last = self.steps >= self.settings.max_tokens;
        let rows = self.ended.iter_mut().zip(&mut self.sequences);
        let mut tokens = Vec::with_capacity(chosen.len());
        for (row, ((ended, sequence), chosen)) in rows.zip(chosen).enumerate() {
            if *ended {
                tokens.push(None);
                continue;
            }
            let Some(&(token, logprob)) = chosen.first().filter(|(_, p)| p.is_finite()) else {
                return Err(Error::Device(format!(
                    "step {}: the logits of sequence {row} are not finite",
                    self.steps
                )));
            };
            sequence.tokens.push(token);
            sequence.score += logprob;
            *ended = last || self.settings.eos.contains(&token);
            tokens.push(Some(token));
        }
        Ok(Step { tokens })
    }
}

impl Iterator for CausalGenerator<'_> {
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
