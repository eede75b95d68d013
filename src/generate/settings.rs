//! What generation goes by: `generation_config.json`, and what the caller wishes otherwise.

use serde_json::Value;

use crate::model::Source;
use crate::{Error, Result};

/// When beam search may stop before its beams have all ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When the best running beam, as long as it is now, cannot beat the worst that ended.
    #[default]
    No,
    /// As soon as as many have ended as there are beams.
    Yes,
    /// When no running beam can beat the worst that ended at any length.
    Never,
}

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Beams; 1 is greedy.
    pub beams: u32,
    /// The most tokens to write, the end token included.
    pub max_tokens: u32,
    /// Scores of ended beams are sums of log-probabilities over length to this power.
    pub length_penalty: f32,
    /// When beam search may stop.
    pub early_stopping: EarlyStopping,
    /// The decoder's first input.
    pub start: u32,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
    /// Written as the first token whatever the model says.
    pub forced_bos: Option<u32>,
    /// Written as the last token of a sequence that reaches `max_tokens`.
    pub forced_eos: Option<u32>,
    /// Never written.
    pub suppressed: Vec<u32>,
    /// Words of several tokens that are never completed; the start token counts as written.
    pub bad_words: Vec<Vec<u32>>,
    /// Not written first.
    pub begin_suppressed: Vec<u32>,
    /// Probabilities are of the tokens that may be written, not of the whole vocabulary.
    pub renormalize: bool,
}

impl Settings {
    /// The settings of a model's directory: `generation_config.json`, or `config.json` where older
    /// exports keep them.
    ///
    /// # Errors
    /// [`Error::Refused`] for a setting that is not honoured here: none is dropped in silence.
    pub fn load(source: &Source) -> Result<Settings> {
        let config = source.json("config.json")?;
        let name = "generation_config.json";
        let own = match source.file(name)? {
            Some(_) => Some(source.json(name)?),
            None => None,
        };
        let path = source.path().join(name);
        let (primary, fallback) = match &own {
            Some(own) => (own, Some(&config)),
            None => (&config, None),
        };
        let get = |key: &str| primary.get(key).filter(|value| !value.is_null());
        // Ids may stand in either file; what the generation file says goes.
        let id_value = |key: &str| {
            get(key).or_else(|| {
                fallback
                    .and_then(|config| config.get(key))
                    .filter(|value| !value.is_null())
            })
        };
        let bad = |key: &str, value: &Value, bound: &str| {
            Error::refused(format!("{key} in {}", path.display()), value, bound)
        };
        let ids = |key: &str, value: Option<&Value>| -> Result<Vec<u32>> {
            let Some(value) = value else {
                return Ok(Vec::new());
            };
            let list = match value {
                Value::Array(list) => list.as_slice(),
                one => std::slice::from_ref(one),
            };
            list.iter()
                .map(|id| {
                    id.as_u64()
                        .and_then(|id| u32::try_from(id).ok())
                        .ok_or_else(|| bad(key, value, "token ids"))
                })
                .collect()
        };
        let one = |key: &str, value: Option<&Value>| -> Result<Option<u32>> {
            match ids(key, value)?.as_slice() {
                [] => Ok(None),
                [id] => Ok(Some(*id)),
                _ => Err(bad(key, value.unwrap_or(&Value::Null), "one token id")),
            }
        };
        for (key, neutral) in [
            ("do_sample", Value::from(false)),
            ("no_repeat_ngram_size", Value::from(0)),
            ("encoder_no_repeat_ngram_size", Value::from(0)),
            ("min_length", Value::from(0)),
            ("min_new_tokens", Value::from(0)),
            ("num_beam_groups", Value::from(1)),
            ("diversity_penalty", Value::from(0.0)),
            ("repetition_penalty", Value::from(1.0)),
            ("encoder_repetition_penalty", Value::from(1.0)),
            ("num_return_sequences", Value::from(1)),
            ("guidance_scale", Value::from(1.0)),
            // Lists and objects that have no neutral value but their absence.
            ("exponential_decay_length_penalty", Value::Null),
            ("sequence_bias", Value::Null),
            ("force_words_ids", Value::Null),
            ("constraints", Value::Null),
            ("stop_strings", Value::Null),
        ] {
            let Some(value) = get(key) else { continue };
            let same = match (value.as_f64(), neutral.as_f64()) {
                (Some(value), Some(neutral)) => value == neutral,
                _ => *value == neutral,
            };
            if !same {
                return Err(bad(key, value, &format!("only {neutral} is honoured")));
            }
        }
        let eos = ids("eos_token_id", id_value("eos_token_id"))?;
        let start = one("decoder_start_token_id", id_value("decoder_start_token_id"))?
            .ok_or_else(|| Error::file(&path, "there is no decoder_start_token_id"))?;
        if eos.is_empty() {
            return Err(Error::file(&path, "there is no eos_token_id"));
        }
        let mut suppressed = ids("suppress_tokens", get("suppress_tokens"))?;
        let mut bad_words = Vec::new();
        if let Some(value) = get("bad_words_ids") {
            for word in value
                .as_array()
                .ok_or_else(|| bad("bad_words_ids", value, "a list of lists"))?
            {
                match ids("bad_words_ids", Some(word))?.as_slice() {
                    // A bad word that ends a sequence is allowed all the same, as transformers has it.
                    [id] if eos.contains(id) => {}
                    [] => return Err(bad("bad_words_ids", value, "words of at least one token")),
                    [id] => suppressed.push(*id),
                    long => bad_words.push(long.to_vec()),
                }
            }
        }
        let number = |key: &str| -> Result<Option<f64>> {
            match get(key) {
                None => Ok(None),
                Some(value) => value
                    .as_f64()
                    .map(Some)
                    .ok_or_else(|| bad(key, value, "a number")),
            }
        };
        Ok(Settings {
            beams: number("num_beams")?.unwrap_or(1.0) as u32,
            max_tokens: match (number("max_new_tokens")?, number("max_length")?) {
                (Some(new), _) => new as u32,
                (None, Some(length)) => (length as u32).saturating_sub(1),
                // As many as the model has positions, which `Translator::load` knows.
                (None, None) => u32::MAX,
            },
            length_penalty: number("length_penalty")?.unwrap_or(1.0) as f32,
            early_stopping: match get("early_stopping") {
                None | Some(Value::Bool(false)) => EarlyStopping::No,
                Some(Value::Bool(true)) => EarlyStopping::Yes,
                Some(Value::String(word)) if word == "never" => EarlyStopping::Never,
                Some(other) => {
                    return Err(bad("early_stopping", other, "true, false or \"never\""));
                }
            },
            start,
            eos,
            forced_bos: one("forced_bos_token_id", get("forced_bos_token_id"))?,
            forced_eos: one("forced_eos_token_id", get("forced_eos_token_id"))?,
            suppressed,
            bad_words,
            begin_suppressed: ids("begin_suppress_tokens", get("begin_suppress_tokens"))?,
            renormalize: get("renormalize_logits").is_some_and(|value| *value == Value::Bool(true)),
        })
    }

    /// An error for settings that the model cannot follow.
    pub(super) fn check(&self, vocab: u32, positions: u32) -> Result<()> {
        if self.beams == 0 || self.beams > MAX_BEAMS {
            return Err(Error::refused(
                "beams",
                self.beams,
                format!("1 to {MAX_BEAMS}"),
            ));
        }
        if self.max_tokens == 0 || self.max_tokens > positions {
            let bound = format!("1 to the model's {positions} positions");
            return Err(Error::refused("max_tokens", self.max_tokens, bound));
        }
        if !self.length_penalty.is_finite() {
            return Err(Error::refused(
                "length_penalty",
                self.length_penalty,
                "a finite number",
            ));
        }
        let ids = [self.start]
            .into_iter()
            .chain(self.forced_bos)
            .chain(self.forced_eos);
        let lists = self
            .eos
            .iter()
            .chain(&self.suppressed)
            .chain(&self.begin_suppressed)
            .chain(self.bad_words.iter().flatten());
        if let Some(id) = ids.chain(lists.copied()).find(|&id| id >= vocab) {
            return Err(Error::refused(
                "a token id of the generation settings",
                id,
                format!("below the vocabulary's {vocab}"),
            ));
        }
        if self.renormalize && !self.bad_words.is_empty() {
            return Err(Error::refused(
                "renormalize_logits",
                true,
                "false, or no bad words of several tokens",
            ));
        }
        let candidates = self.candidates();
        if candidates > vocab {
            return Err(Error::refused(
                "beams",
                self.beams,
                format!("a vocabulary of {candidates} tokens or more"),
            ));
        }
        Ok(())
    }

    /// Candidates that a step needs of each sequence: those that may be banned come on top.
    pub(super) fn candidates(&self) -> u32 {
        let needed = match self.beams {
            1 => 1,
            beams => beams * (1 + self.eos.len() as u32).max(2),
        };
        needed + self.bad_words.len() as u32
    }

    /// Whether `token` behind `written` completes a bad word.
    pub(super) fn bans(&self, written: &[u32], token: u32) -> bool {
        self.bad_words.iter().any(|word| {
            let Some((last, before)) = word.split_last() else {
                return false;
            };
            *last == token
                && match before.len() <= written.len() {
                    true => written.ends_with(before),
                    false => before[0] == self.start && before[1..] == *written,
                }
        })
    }
}

/// The most beams: the reorder kernel holds one history of each in registers.
pub const MAX_BEAMS: u32 = 32;
