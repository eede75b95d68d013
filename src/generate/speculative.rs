//! Speculative decoding (Leviathan et al. 2023) of greedy texts: a step computes drafted tokens beside the last one, and
//! keeps those that the model writes itself.

use std::collections::VecDeque;

use super::CausalSettings;
use super::causal::refuse_growing;
use super::draft::{Drafter, MAX_BRANCHES, MAX_TOKENS};
use super::greedy::{Greedy, Logits};
use crate::cache::{Keep, SequenceId};
use crate::gpu::DType;
use crate::model::CausalModel;
use crate::ops::Sampling;
use crate::{Error, Result};

/// Goes on with a prompt greedily, several tokens a step where a drafter guesses them: an iterator of tokens and their
/// log-probabilities. They are those that a [`super::Batch`] writes, whatever is drafted: the branches of a draft are
/// sequences that share their pages, so that each token is computed at its place in a text of its own, bit for bit as
/// if its step were the next.
pub struct Speculative<'m> {
    greedy: Greedy<'m>,
    drafter: Box<dyn Drafter + 'm>,
    settings: CausalSettings,
    /// The prompt and what is written behind it.
    text: Vec<u32>,
    prompt: usize,
    /// Has all of the text but its last token.
    cached: SequenceId,
    /// Written, and not yet given out.
    ready: VecDeque<(u32, f32)>,
    over: bool,
    counts: DraftCounts,
}

/// What drafts have brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftCounts {
    /// Steps, that over the prompt included.
    pub steps: u32,
    /// Tokens that were drafted, on all branches.
    pub drafted: u32,
    /// Those that were kept: a step writes one token more.
    pub accepted: u32,
}

impl<'m> Speculative<'m> {
    /// Prepares to go on with a prompt; keys and values are stored as `types` says.
    ///
    /// # Errors
    /// [`Error::Refused`] for what [`super::CausalGenerator::new`] refuses, for settings that are not greedy, and for a
    /// model whose rotary base grows with the context; [`Error::OutOfMemory`] where the cache does not fit.
    pub fn new(
        model: &'m CausalModel,
        prompt: &[u32],
        settings: &CausalSettings,
        types: [DType; 2],
        drafter: Box<dyn Drafter + 'm>,
    ) -> Result<Self> {
        let spec = model.spec();
        settings.check(spec.vocab)?;
        let Sampling {
            temperature,
            repeat_penalty,
            ..
        } = settings.sampling;
        for (name, value, greedy) in [
            ("temperature", temperature, 0.0),
            ("repeat_penalty", repeat_penalty, 1.0),
        ] {
            if value != greedy {
                let bound = format!("{greedy}: drafts are for greedy texts");
                return Err(Error::refused(name, value, bound));
            }
        }
        refuse_growing(model)?;
        if prompt.is_empty() {
            return Err(Error::refused("a prompt", "empty", "a token at least"));
        }
        // The last token is written nowhere.
        let positions = prompt.len() as u64 + u64::from(settings.max_tokens) - 1;
        if positions > u64::from(spec.max_positions) {
            let bound = format!("the model has {} positions", spec.max_positions);
            return Err(Error::refused("a prompt and max_tokens", positions, bound));
        }
        let tokens = MAX_TOKENS + 1;
        let mut greedy = Greedy::new(
            model,
            types,
            positions as u32,
            [MAX_BRANCHES, tokens],
            [MAX_BRANCHES * tokens, 1],
        )?;
        Ok(Speculative {
            cached: greedy.cache.start(&[], Keep::default()),
            greedy,
            drafter,
            settings: settings.clone(),
            text: prompt.to_vec(),
            prompt: prompt.len(),
            ready: VecDeque::new(),
            over: false,
            counts: DraftCounts::default(),
        })
    }

    /// What drafts have brought so far.
    pub fn counts(&self) -> DraftCounts {
        self.counts
    }

    /// Bytes of the keys and values on the device, without a drafter's.
    pub fn cache_bytes(&self) -> u64 {
        self.greedy.cache.bytes()
    }

    /// The branches of a step; without a draft there is one of no tokens.
    fn drafts(&mut self) -> Result<Vec<Vec<u32>>> {
        let left = self.settings.max_tokens - (self.text.len() - self.prompt) as u32;
        // A step writes a token more than it takes from a draft.
        let most = (left - 1).min(MAX_TOKENS);
        // The prompt alone: after none of its tokens but the last is there anything to ask.
        let mut branches = match self.counts.steps > 0 && most > 0 {
            true => self.drafter.draft(&self.text, most)?,
            false => Vec::new(),
        };
        branches.retain(|branch| !branch.is_empty());
        if branches.len() > MAX_BRANCHES as usize {
            let bound = format!("at most {MAX_BRANCHES}");
            return Err(Error::refused("a draft's branches", branches.len(), bound));
        }
        if let Some(branch) = branches.iter().find(|branch| branch.len() > most as usize) {
            let bound = format!("at most {most}");
            return Err(Error::refused("a draft's tokens", branch.len(), bound));
        }
        if branches.is_empty() {
            branches.push(Vec::new());
        }
        Ok(branches)
    }

    fn advance(&mut self) -> Result<()> {
        let branches = self.drafts()?;
        let cache = &mut self.greedy.cache;
        let mut ids = vec![self.cached];
        for _ in 1..branches.len() {
            ids.push(cache.fork(self.cached)?);
        }
        let before = cache.len(self.cached)?;
        let open = &self.text[before as usize..];
        let texts: Vec<Vec<u32>> = branches
            .iter()
            .map(|branch| [open, branch].concat())
            .collect();
        let new: Vec<(SequenceId, &[u32])> = ids
            .iter()
            .zip(&texts)
            .map(|(&id, text)| (id, &text[..]))
            .collect();
        let wanted = match self.counts.steps {
            0 => Logits::Last,
            _ => Logits::All,
        };
        let mut choices = self.greedy.step(&new, wanted)?.into_iter();
        self.counts.steps += 1;
        self.counts.drafted += branches
            .iter()
            .map(|branch| branch.len() as u32)
            .sum::<u32>();

        // Of each branch what the model writes itself, and one token more.
        let mut written: Vec<Vec<(u32, f32)>> = Vec::with_capacity(branches.len());
        for branch in &branches {
            let rows: Vec<_> = choices.by_ref().take(branch.len() + 1).collect();
            let mut own = Vec::new();
            for (ix, row) in rows.iter().enumerate() {
                let Some(&(token, logprob)) = row.first().filter(|(_, p)| p.is_finite()) else {
                    let n = self.text.len() - self.prompt + ix + 1;
                    return Err(Error::Device(format!(
                        "token {n}: the logits are not finite"
                    )));
                };
                own.push((token, logprob));
                if branch.get(ix) != Some(&token) {
                    break;
                }
            }
            written.push(own);
        }
        let longest = written.iter().map(Vec::len).max();
        let best = written.iter().position(|own| Some(own.len()) == longest);
        let best = best.unwrap_or(0);
        let own = written.swap_remove(best);

        let kept = before + open.len() as u32 + own.len() as u32 - 1;
        self.cached = ids.swap_remove(best);
        let cache = &mut self.greedy.cache;
        cache.truncate(self.cached, kept)?;
        for id in ids {
            cache.remove(id)?;
        }
        for (ix, (token, logprob)) in own.into_iter().enumerate() {
            self.counts.accepted += u32::from(ix > 0);
            self.text.push(token);
            self.ready.push_back((token, logprob));
            let full = self.text.len() - self.prompt == self.settings.max_tokens as usize;
            if full || self.settings.eos.contains(&token) {
                self.over = true;
                break;
            }
        }
        Ok(())
    }
}

impl Iterator for Speculative<'_> {
    type Item = Result<(u32, f32)>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = match self.ready.is_empty() && !self.over {
            true => self.advance(),
            false => Ok(()),
        };
        if let Err(error) = step {
            self.over = true;
            return Some(Err(error));
        }
        self.ready.pop_front().map(Ok)
    }
}
