//! What generation goes by: `generation_config.json`, and what the caller wishes otherwise.

use std::path::PathBuf;

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
        let wishes = Wishes::load(source)?;
        wishes.only(&UNKNOWN)?;
        wishes.only(&[
            ("do_sample", Neutral::False),
            ("repetition_penalty", Neutral::Number(1.0)),
        ])?;
        let (get, bad) = (
            |key| wishes.get(key),
            |key, value: &Value, bound: &str| wishes.refused(key, value, bound),
        );
        let eos = wishes.ids("eos_token_id", wishes.id("eos_token_id"))?;
        let start = wishes
            .one(
                "decoder_start_token_id",
                wishes.id("decoder_start_token_id"),
            )?
            .ok_or_else(|| wishes.lacks("decoder_start_token_id"))?;
        if eos.is_empty() {
            return Err(wishes.lacks("eos_token_id"));
        }
        let mut suppressed = wishes.ids("suppress_tokens", get("suppress_tokens"))?;
        let mut bad_words = Vec::new();
        if let Some(value) = get("bad_words_ids") {
            for word in value
                .as_array()
                .ok_or_else(|| bad("bad_words_ids", value, "a list of lists"))?
            {
                match wishes.ids("bad_words_ids", Some(word))?.as_slice() {
                    // A bad word that ends a sequence is allowed all the same, as transformers has it.
                    [id] if eos.contains(id) => {}
                    [] => return Err(bad("bad_words_ids", value, "words of at least one token")),
                    [id] => suppressed.push(*id),
                    long => bad_words.push(long.to_vec()),
                }
            }
        }
        let (number, whole) = (|key| wishes.number(key), |key| wishes.whole(key));
        Ok(Settings {
            beams: whole("num_beams")?.unwrap_or(1),
            max_tokens: match (whole("max_new_tokens")?, whole("max_length")?) {
                (Some(new), _) => new,
                (None, Some(length)) => length.saturating_sub(1),
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
            forced_bos: wishes.one("forced_bos_token_id", get("forced_bos_token_id"))?,
            forced_eos: wishes.one("forced_eos_token_id", get("forced_eos_token_id"))?,
            suppressed,
            bad_words,
            begin_suppressed: wishes.ids("begin_suppress_tokens", get("begin_suppress_tokens"))?,
            renormalize: wishes.flag("renormalize_logits")?,
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

/// What a decoder-only model's directory says of generation. How its texts are drawn, `do_sample`, `temperature`, `top_k`
/// and their like, and how long they may be, is the caller's to say.
#[derive(Clone, Debug, PartialEq)]
pub struct CausalWishes {
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// `repetition_penalty`, which transformers applies to greedy texts too; 1 for none.
    pub repeat_penalty: f32,
}

impl CausalWishes {
    /// Of `generation_config.json`, or `config.json` where older exports keep them.
    ///
    /// # Errors
    /// [`Error::Refused`] for a setting that would change greedy texts and is not honoured.
    pub fn load(source: &Source) -> Result<CausalWishes> {
        let wishes = Wishes::load(source)?;
        wishes.only(&UNKNOWN)?;
        wishes.only(&[
            ("num_beams", Neutral::Number(1.0)),
            ("bad_words_ids", Neutral::Nothing),
            ("suppress_tokens", Neutral::Nothing),
            ("begin_suppress_tokens", Neutral::Nothing),
            ("forced_bos_token_id", Neutral::Nothing),
            ("forced_eos_token_id", Neutral::Nothing),
        ])?;
        Ok(CausalWishes {
            eos: wishes.ids("eos_token_id", wishes.id("eos_token_id"))?,
            repeat_penalty: wishes.number("repetition_penalty")?.unwrap_or(1.0) as f32,
        })
    }
}

/// With what value a setting changes nothing.
#[derive(Clone, Copy)]
enum Neutral {
    Number(f64),
    False,
    /// Only by its absence, or an empty list.
    Nothing,
}

/// Settings that no kind of model is generated by here.
const UNKNOWN: [(&str, Neutral); 20] = [
    ("no_repeat_ngram_size", Neutral::Number(0.0)),
    ("encoder_no_repeat_ngram_size", Neutral::Number(0.0)),
    ("min_length", Neutral::Number(0.0)),
    ("min_new_tokens", Neutral::Number(0.0)),
    ("num_beam_groups", Neutral::Number(1.0)),
    ("diversity_penalty", Neutral::Number(0.0)),
    ("encoder_repetition_penalty", Neutral::Number(1.0)),
    ("num_return_sequences", Neutral::Number(1.0)),
    ("guidance_scale", Neutral::Number(1.0)),
    ("penalty_alpha", Neutral::Number(0.0)),
    ("token_healing", Neutral::False),
    ("exponential_decay_length_penalty", Neutral::Nothing),
    ("sequence_bias", Neutral::Nothing),
    ("force_words_ids", Neutral::Nothing),
    ("forced_decoder_ids", Neutral::Nothing),
    ("constraints", Neutral::Nothing),
    ("stop_strings", Neutral::Nothing),
    ("watermarking_config", Neutral::Nothing),
    ("dola_layers", Neutral::Nothing),
    ("max_time", Neutral::Nothing),
];

/// `generation_config.json`, or `config.json` where there is none.
struct Wishes {
    /// The file that speaks, and what it says.
    file: (PathBuf, Value),
    /// `config.json`, if that is another one.
    config: Option<(PathBuf, Value)>,
}

impl Wishes {
    fn load(source: &Source) -> Result<Wishes> {
        let read = |name: &str| Ok::<_, Error>((source.path().join(name), source.json(name)?));
        let config = read("config.json")?;
        let name = "generation_config.json";
        Ok(match source.file(name)? {
            Some(_) => Wishes {
                file: read(name)?,
                config: Some(config),
            },
            None => Wishes {
                file: config,
                config: None,
            },
        })
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.file.1.get(key).filter(|value| !value.is_null())
    }

    /// Ids may stand in either file; what the generation file says goes.
    fn id(&self, key: &str) -> Option<&Value> {
        let other = || self.config.as_ref()?.1.get(key);
        self.get(key)
            .or_else(|| other().filter(|value| !value.is_null()))
    }

    fn refused(&self, key: &str, value: &Value, bound: &str) -> Error {
        // Where the value stands.
        let other = self.config.as_ref().filter(|_| self.get(key).is_none());
        let (path, _) = other.unwrap_or(&self.file);
        Error::refused(format!("{key} in {}", path.display()), value, bound)
    }

    fn lacks(&self, key: &str) -> Error {
        Error::file(&self.file.0, format_args!("there is no {key}"))
    }

    /// An error for a setting that would change something.
    fn only(&self, settings: &[(&str, Neutral)]) -> Result<()> {
        for &(key, neutral) in settings {
            let Some(value) = self.get(key) else { continue };
            let (same, bound) = match neutral {
                Neutral::Number(n) => (value.as_f64() == Some(n), format!("only {n} is honoured")),
                Neutral::False => (
                    *value == Value::Bool(false),
                    "only false is honoured".into(),
                ),
                Neutral::Nothing => (
                    value.as_array().is_some_and(Vec::is_empty),
                    "it is not honoured".into(),
                ),
            };
            if !same {
                return Err(self.refused(key, value, &bound));
            }
        }
        Ok(())
    }

    fn ids(&self, key: &str, value: Option<&Value>) -> Result<Vec<u32>> {
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
                    .ok_or_else(|| self.refused(key, value, "token ids"))
            })
            .collect()
    }

    fn one(&self, key: &str, value: Option<&Value>) -> Result<Option<u32>> {
        match self.ids(key, value)?.as_slice() {
            [] => Ok(None),
            [id] => Ok(Some(*id)),
            _ => Err(self.refused(key, value.unwrap_or(&Value::Null), "one token id")),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let number = value.as_f64();
        number
            .map(Some)
            .ok_or_else(|| self.refused(key, value, "a number"))
    }

    fn whole(&self, key: &str) -> Result<Option<u32>> {
        let Some(number) = self.number(key)? else {
            return Ok(None);
        };
        match number.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&number) {
            true => Ok(Some(number as u32)),
            false => Err(self.refused(key, &number.into(), "a whole number")),
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.refused(key, other, "true or false")),
        }
    }
}
