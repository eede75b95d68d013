//! Beam search over one source, on the host: from each step's candidates to the next step's beams. The
//! rules are those of Hugging Face transformers (`_beam_search`, 5.x), so that its results are met.

use super::EarlyStopping;

/// What a search goes by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules<'a> {
    pub beams: usize,
    pub eos: &'a [u32],
    pub max_tokens: usize,
    pub length_penalty: f32,
    pub early_stopping: EarlyStopping,
}

/// Stands for the score of a beam that is not there yet.
const NOTHING: f32 = -1e9;

/// Tokens and their score.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Hypothesis {
    pub tokens: Vec<u32>,
    pub score: f32,
}

/// The search for one source.
#[derive(Debug)]
pub(super) struct Search {
    /// Sequences being written, best first; scores are sums of log-probabilities.
    running: Vec<Hypothesis>,
    /// Sequences that have ended, best first; scores are over length ^ penalty.
    ended: Vec<Hypothesis>,
    improvable: bool,
    over: bool,
}

/// How one beam goes on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Move {
    pub parent: u32,
    pub token: u32,
}

impl Search {
    pub fn new(beams: usize) -> Self {
        // Only one of the equal beams of the start may be continued.
        let start = |ix| Hypothesis {
            tokens: Vec::new(),
            score: if ix == 0 { 0.0 } else { NOTHING },
        };
        Search {
            running: (0..beams).map(start).collect(),
            ended: Vec::new(),
            improvable: true,
            over: false,
        }
    }

    pub fn over(&self) -> bool {
        self.over
    }

    /// One step. `candidates` are each beam's tokens and log-probabilities, best first. The answer is
    /// how each beam goes on; it is empty once the search is over.
    pub fn advance(&mut self, candidates: &[Vec<(u32, f32)>], rules: &Rules) -> Vec<Move> {
        if self.over {
            return Vec::new();
        }
        let length = self.running[0].tokens.len() + 1;
        let last = length >= rules.max_tokens;
        let mut all: Vec<(f32, Move)> = Vec::new();
        for (parent, tokens) in candidates.iter().enumerate() {
            all.extend(tokens.iter().map(|&(token, logprob)| {
                let parent_ = parent as u32;
                (
                    self.running[parent].score + logprob,
                    Move {
                        parent: parent_,
                        token,
                    },
                )
            }));
        }
        // Best first; of equals the lower beam, then the lower token.
        all.sort_by(|(a, x), (b, y)| {
            b.total_cmp(a)
                .then(x.parent.cmp(&y.parent))
                .then(x.token.cmp(&y.token))
        });
        all.truncate(2.max(1 + rules.eos.len()) * rules.beams);
        let ends = |token: u32| last || rules.eos.contains(&token);

        let full = self.ended.len() == rules.beams;
        let admit = self.improvable && !(rules.early_stopping == EarlyStopping::Yes && full);
        if admit {
            for (score, step) in all
                .iter()
                .take(rules.beams)
                .filter(|(_, step)| ends(step.token))
            {
                let tokens = self.extended(step);
                let score = score / (length as f32).powf(rules.length_penalty);
                // Behind those of the same score, which ended before.
                let at = self.ended.partition_point(|other| other.score >= score);
                self.ended.insert(at, Hypothesis { tokens, score });
            }
            self.ended.truncate(rules.beams);
        }

        let moves: Vec<(f32, Move)> = all
            .into_iter()
            .filter(|(_, step)| !ends(step.token))
            .take(rules.beams)
            .collect();
        let full = self.ended.len() == rules.beams;
        if moves.len() < rules.beams {
            // The length is spent, or too few tokens are allowed to go on with.
            self.over = true;
            return Vec::new();
        }
        self.running = moves
            .iter()
            .map(|(score, step)| Hypothesis {
                tokens: self.extended(step),
                score: *score,
            })
            .collect();
        let horizon = match rules.early_stopping {
            EarlyStopping::Never if rules.length_penalty > 0.0 => rules.max_tokens,
            _ => length,
        };
        let best = self.running[0].score / (horizon as f32).powf(rules.length_penalty);
        let worst = match full {
            true => self.ended[rules.beams - 1].score,
            false => NOTHING,
        };
        self.improvable = self.improvable && best > worst;
        self.over = !self.improvable || (rules.early_stopping == EarlyStopping::Yes && full);
        match self.over {
            true => Vec::new(),
            false => moves.into_iter().map(|(_, step)| step).collect(),
        }
    }

    fn extended(&self, step: &Move) -> Vec<u32> {
        let mut tokens = self.running[step.parent as usize].tokens.clone();
        tokens.push(step.token);
        tokens
    }

    /// What beam `ix` has written.
    pub fn written(&self, ix: usize) -> &[u32] {
        &self.running[ix].tokens
    }

    /// The best sequence that has ended; while none has, the best that runs.
    pub fn best(&self) -> &Hypothesis {
        self.ended.first().unwrap_or(&self.running[0])
    }
}
