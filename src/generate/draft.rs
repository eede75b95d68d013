//! Where drafts of the next tokens come from.

use super::causal::refuse_growing;
use super::greedy::{Greedy, Logits};
use crate::cache::{Keep, SequenceId};
use crate::model::CausalModel;
use crate::{Error, Result};

/// The most branches of a draft, and the most tokens of each.
pub(super) const MAX_BRANCHES: u32 = 4;
pub(super) const MAX_TOKENS: u32 = 16;

/// Guesses how a text goes on. What is written does not depend on it, only how fast.
pub trait Drafter {
    /// A tree of what may follow the text, as its branches: each the tokens from the text's end to a leaf, at
    /// most `most`; four branches at most, and none at all for no guess. The text may have grown by any number of
    /// tokens since the last call, but is otherwise the same.
    ///
    /// # Errors
    /// What a device answers.
    fn draft(&mut self, text: &[u32], most: u32) -> Result<Vec<Vec<u32>>>;
}

/// Drafts what followed the text's last tokens where they stood before (prompt lookup, Saxena 2023): behind their
/// last place and, as another branch, behind the last one that went on otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ngram {
    /// Tokens of a branch.
    pub tokens: u32,
}

/// The longest n-gram that is looked for; then shorter ones.
const LONGEST: usize = 3;

impl Drafter for Ngram {
    fn draft(&mut self, text: &[u32], most: u32) -> Result<Vec<Vec<u32>>> {
        let tokens = self.tokens.min(most) as usize;
        for n in (1..=LONGEST.min(text.len())).rev() {
            let (_, tail) = text.split_at(text.len() - n);
            let mut branches: Vec<Vec<u32>> = Vec::new();
            let ends = (n..text.len()).rev();
            for end in ends.filter(|&end| text[..end].ends_with(tail)) {
                if branches.first().is_some_and(|first| first[0] == text[end]) {
                    continue;
                }
                // A text that repeats itself goes on repeating itself.
                let period = text.len() - end;
                branches.push((0..tokens).map(|at| text[end + at % period]).collect());
                if tokens == 0 || branches.len() == 2 {
                    return Ok(branches);
                }
            }
            if !branches.is_empty() {
                return Ok(branches);
            }
        }
        Ok(Vec::new())
    }
}

/// Drafts what another model writes, greedily: a branch from its likeliest token, and one from the second.
pub struct ModelDrafter<'m> {
    greedy: Greedy<'m>,
    tokens: u32,
    /// Its branches of the last draft, of which the text may have taken one.
    branches: Vec<SequenceId>,
}

impl<'m> ModelDrafter<'m> {
    /// A drafter of branches of `tokens`, for texts of up to `positions`.
    ///
    /// # Errors
    /// [`Error::Refused`] for a model whose rotary base grows with the context, for no tokens and for more than 16;
    /// [`Error::OutOfMemory`] where its cache does not fit.
    pub fn new(model: &'m CausalModel, tokens: u32, positions: u32) -> Result<Self> {
        refuse_growing(model)?;
        if tokens == 0 || tokens > MAX_TOKENS {
            let bound = format!("1 to {MAX_TOKENS}");
            return Err(Error::refused("a draft's tokens", tokens, bound));
        }
        let positions = positions.min(model.spec().max_positions);
        let types = [model.dtype(); 2];
        let mut greedy = Greedy::new(model, types, positions, [2, tokens], [2, 2])?;
        let branches = vec![greedy.cache.start(&[], Keep::default())];
        Ok(ModelDrafter {
            greedy,
            tokens,
            branches,
        })
    }

    /// Leaves one sequence, that which has most of the text, cut back to what it has; but never the last token.
    fn catch_up(&mut self, text: &[u32]) -> Result<(SequenceId, usize)> {
        let cache = &mut self.greedy.cache;
        let mut best = None;
        for &id in &self.branches {
            let known = cache.tokens(id)?.iter().zip(text);
            let same = known.take_while(|(a, b)| a == b).count();
            if best.is_none_or(|(_, most)| same > most) {
                best = Some((id, same));
            }
        }
        let (kept, same) = best.unwrap_or_else(|| (cache.start(&[], Keep::default()), 0));
        for id in std::mem::replace(&mut self.branches, vec![kept]) {
            if id != kept {
                cache.remove(id)?;
            }
        }
        let same = same.min(text.len() - 1);
        cache.truncate(kept, same as u32)?;
        Ok((kept, same))
    }
}

impl Drafter for ModelDrafter<'_> {
    fn draft(&mut self, text: &[u32], most: u32) -> Result<Vec<Vec<u32>>> {
        let room = self.greedy.positions().saturating_sub(text.len() as u32);
        let tokens = self.tokens.min(most).min(room);
        if tokens == 0 || text.is_empty() {
            return Ok(Vec::new());
        }
        let (first, same) = self.catch_up(text)?;
        let rows = self.greedy.step(&[(first, &text[same..])], Logits::Last)?;
        let mut branches: Vec<Vec<u32>> = rows[0].iter().map(|&(token, _)| vec![token]).collect();
        if tokens > 1 && branches.len() > 1 {
            self.branches.push(self.greedy.cache.fork(first)?);
        }
        for _ in 1..tokens {
            let ids = self.branches.iter().copied();
            let new: Vec<(SequenceId, &[u32])> = ids
                .zip(&branches)
                .map(|(id, branch)| (id, &branch[branch.len() - 1..]))
                .collect();
            let rows = self.greedy.step(&new, Logits::Last)?;
            for (branch, row) in branches.iter_mut().zip(rows) {
                branch.extend(row.first().map(|&(token, _)| token));
            }
        }
        Ok(branches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n_grams_go_on_as_they_did_before() {
        type Case<'a> = (&'a [u32], u32, &'a [&'a [u32]]);
        let cases: [Case; 10] = [
            (&[], 4, &[]),
            (&[1, 2, 3], 4, &[]),
            (&[1, 2, 3, 1], 2, &[&[2, 3]]),
            // The last place first, then the last that went on otherwise.
            (&[5, 1, 5, 2, 5], 1, &[&[2], &[1]]),
            (&[5, 1, 8, 5, 2, 9, 5], 2, &[&[2, 9], &[1, 8]]),
            // Three tokens that are found count, not the one that stands nearer.
            (&[1, 2, 3, 7, 3, 8, 1, 2, 3], 1, &[&[7]]),
            // So there is no other branch from fewer.
            (&[5, 1, 5, 2, 5, 2, 5], 1, &[&[2]]),
            // It repeats itself.
            (&[4, 6, 4, 6, 4], 5, &[&[6, 4, 6, 4, 6]]),
            (&[9, 9], 3, &[&[9, 9, 9]]),
            (&[9, 9], 0, &[&[]]),
        ];
        for (text, most, want) in cases {
            let got = Ngram { tokens: 5 }.draft(text, most).unwrap();
            assert_eq!(got, want, "{text:?}");
        }
    }
}
