//! Generation by decoder-only models, a step at a time, greedily.

use super::{Sequence, Step, read_choices};
use crate::gpu::{DType, Recorder, Recording, Tensor};
use crate::model::{CausalModel, Chunk, Padded, Wanted};
use crate::ops::{self, Choice};
use crate::{Error, Result};

/// How decoder-only models go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CausalSettings {
    /// The most tokens to write for each prompt, the end token included.
    pub max_tokens: u32,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
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
    steps: u32,
    ended: Vec<bool>,
    sequences: Vec<Sequence>,
    failed: bool,
}

impl<'m> CausalGenerator<'m> {
    /// Prepares to go on with prompts of one length or of several.
    ///
    /// # Errors
    /// [`Error::Refused`] for no prompts, an empty one, tokens outside the vocabulary, and prompts that leave
    /// no room for `max_tokens` within the model's positions; [`Error::OutOfMemory`] where the cache does not
    /// fit.
    pub fn new<R: AsRef<[u32]>>(
        model: &'m CausalModel,
        prompts: &[R],
        settings: &CausalSettings,
    ) -> Result<Self> {
        let (gpu, spec) = (model.gpu(), model.spec());
        if let Some(id) = settings.eos.iter().find(|&&id| id >= spec.vocab) {
            let bound = format!("below the vocabulary's {}", spec.vocab);
            return Err(Error::refused("an end token", id, bound));
        }
        let padded = Padded::new(prompts, 0);
        let room = spec.max_positions.saturating_sub(padded.len) as u64 + 1;
        if settings.max_tokens == 0 || settings.max_tokens as u64 > room {
            let (most, longest) = (spec.max_positions, padded.len);
            let bound = format!(
                "at least 1, and within the model's {most} positions behind the longest prompt's {longest}"
            );
            return Err(Error::refused("max_tokens", settings.max_tokens, bound));
        }
        let n = padded.lengths.len() as u32;
        let chunk = model.chunk(&padded, &vec![0; n as usize], Wanted::Last)?;
        // The last token is written nowhere.
        let cache = model.cache(n, padded.len + settings.max_tokens - 1)?;
        gpu.write(&cache.lengths, bytemuck::cast_slice(&padded.lengths))?;
        let ids = gpu.empty("ids", DType::U32, &[n])?;
        let logits = gpu.empty("logits", DType::F32, &[n, spec.vocab])?;
        let chosen = gpu.empty("chosen", DType::U32, &[n, 1, 2])?;
        let words = spec.vocab.div_ceil(32);
        let all = vec![u32::MAX; 2 * words as usize];
        let allowed = gpu.upload_u32("allowed", &[2, words], &all)?;
        let staging = gpu.staging(chosen.len() * 4)?;
        let record = |chunk: &Chunk| -> Result<Recording> {
            let mut recorder = Recorder::new(gpu);
            model.record_step(&mut recorder, &cache, chunk, &logits)?;
            let choice = Choice {
                logits: &logits,
                allowed: &allowed,
                lengths: &cache.lengths,
                chosen: &chosen,
                ids: &ids,
                renormalize: false,
            };
            ops::choose(&mut recorder, choice)?;
            recorder.copy(&chosen, staging.buffer(), 0);
            recorder.finish()
        };
        Ok(CausalGenerator {
            prompts: Some(record(&chunk)?),
            step: record(&Chunk::one(&ids))?,
            model,
            settings: settings.clone(),
            staging,
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
