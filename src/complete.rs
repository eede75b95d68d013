//! From a prompt to what follows it: a tokenizer, a decoder-only model and its ends as one.

use std::collections::HashMap;

use crate::generate::{
    Batch, CausalGenerator, CausalSettings, CausalWishes, DraftCounts, Drafter, Event,
    ModelDrafter, Ngram, RequestId, Sequence, Speculative,
};
use crate::gguf::Gguf;
use crate::gpu::{DType, Gpu};
use crate::model::{CausalModel, Source};
use crate::ops::Sampling;
use crate::text::{ChatTemplate, LmStreaming, LmTokenizer, Message};
use crate::{Error, Result};

/// A decoder-only model, ready for texts.
pub struct Completer {
    /// Its tokenizer.
    pub tokenizer: LmTokenizer,
    /// How it wants chats written, where it says so.
    pub template: Option<ChatTemplate>,
    /// Its stack, on the device.
    pub model: CausalModel,
    /// Tokens that end a text or a turn.
    pub eos: Vec<u32>,
    /// The repeat penalty that the model's directory asks for, 1 for none: for the [`Rules`] of a caller who wishes no
    /// other.
    pub repeat_penalty: f32,
    /// How [`Completer::complete`] stores keys and values; as activations are, if not given.
    pub kv_types: Option<[DType; 2]>,
    /// Where [`Completer::complete`] takes drafts from, if anywhere.
    pub drafts: Option<Drafts>,
}

/// Who drafts the next tokens, and how many at a time.
pub enum Drafts {
    /// The text itself: see [`Ngram`].
    Ngram(u32),
    /// A smaller model of the same vocabulary: see [`ModelDrafter`].
    Model(Box<CausalModel>, u32),
}

/// How a text goes on.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// The most tokens to write, the end token included.
    pub max_tokens: u32,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// What draws depend on.
    pub seed: u64,
    /// Texts that end it; they are not part of it.
    pub stop: Vec<String>,
}

/// Why a text has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By a token of the model.
    Token(u32),
    /// By a text to stop at.
    Stop(String),
    /// By the most tokens.
    MaxTokens,
}

/// What follows a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The text, without what ended it.
    pub text: String,
    /// What was written, the end token or the tokens of a text to stop at included.
    pub tokens: Vec<u32>,
    /// The sum of the model's log-probabilities of these tokens.
    pub score: f32,
    /// Why it ended.
    pub end: End,
    /// Bytes of the keys and values on the device; of a batch, of all its texts together.
    pub cache_bytes: u64,
    /// What drafts have brought, where there were any.
    pub drafts: Option<DraftCounts>,
}

/// What is heard of a text of a batch.
pub enum Heard {
    /// It has a token more.
    Token,
    /// It has ended, or cannot be written.
    Ended(Result<Completion>),
}

impl Completer {
    /// Loads a Hugging Face directory or a GGUF file. `progress` hears of bytes taken and bytes in all.
    ///
    /// # Errors
    /// As [`CausalModel::load`], [`LmTokenizer::load`], [`ChatTemplate::load`] and [`CausalWishes::load`]; a tokenizer
    /// with more tokens than the model.
    pub fn load(
        gpu: &Gpu,
        source: &Source,
        dtype: DType,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Completer> {
        let (tokenizer, template, mut wishes, model) = match source {
            Source::Gguf(path) => {
                let gguf = Gguf::open(path)?;
                let template = ChatTemplate::from_gguf(gguf.header())?;
                let tokenizer = LmTokenizer::from_gguf(gguf.header())?;
                let wishes = CausalWishes {
                    eos: Vec::new(),
                    repeat_penalty: 1.0,
                };
                let model = CausalModel::load_gguf(gpu, gguf, dtype, progress)?;
                (tokenizer, template, wishes, model)
            }
            _ => {
                let read = |name: &str| Ok(source.file(name)?.map(|bytes| bytes.to_vec()));
                // First, so that a wrong path is said to be one.
                let wishes = CausalWishes::load(source)?;
                let template = ChatTemplate::load(source.path(), &read)?;
                let tokenizer = LmTokenizer::load(source.path(), &read)?;
                let model = CausalModel::load(gpu, source, dtype, progress)?;
                (tokenizer, template, wishes, model)
            }
        };
        let eos = &mut wishes.eos;
        eos.extend(tokenizer.ends());
        eos.sort_unstable();
        eos.dedup();
        let vocab = model.spec().vocab;
        if tokenizer.len() > vocab as usize {
            let n = tokenizer.len();
            let what = format_args!("its tokenizer has {n} tokens, its model {vocab}");
            return Err(Error::file(source.path(), what));
        }
        Ok(Completer {
            tokenizer,
            template,
            model,
            eos: wishes.eos,
            repeat_penalty: wishes.repeat_penalty,
            kv_types: None,
            drafts: None,
        })
    }

    /// The ids of a text to go on with, or with `chat` of a user's turn to answer.
    ///
    /// # Errors
    /// [`Error::Refused`] for an empty text, for a chat with a model that has no template, and for a text as long
    /// as the model's positions.
    pub fn prompt(&self, text: &str, chat: bool) -> Result<Vec<u32>> {
        if text.trim().is_empty() {
            return Err(Error::refused(
                "the prompt",
                "empty",
                "a text to go on with",
            ));
        }
        let ids = match (chat, &self.template) {
            (true, Some(template)) => {
                let turn = Message {
                    role: "user".into(),
                    content: text.into(),
                };
                let chat = template.render(&[turn], true)?;
                self.tokenizer.encode(&chat, false)?
            }
            (true, None) => {
                let bound = "a model with a chat template: this one has none";
                return Err(Error::refused("chat", "wanted", bound));
            }
            (false, _) => self.tokenizer.encode(text, true)?,
        };
        let most = self.model.spec().steady_positions() as usize;
        if ids.len() > most {
            let long = format!("{} tokens long", ids.len());
            let bound = format!("at most the model's {most} positions");
            return Err(Error::refused("the prompt", long, bound));
        }
        Ok(ids)
    }

    /// Goes on with a prompt; `hear` gets what each token adds, which may be nothing yet, and what is left at the end:
    /// text with which one to stop at may begin is held back.
    ///
    /// # Errors
    /// As [`CausalGenerator::new`], or with drafts as [`Speculative::new`]; [`Error::Refused`] for an empty text to
    /// stop at, and for drafts of another vocabulary; what `hear` returns.
    pub fn complete(
        &self,
        prompt: &[u32],
        rules: &Rules,
        hear: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Completion> {
        let settings = self.settings(rules)?;
        let types = self.kv_types.unwrap_or([self.model.dtype(); 2]);
        if let Some(drafts) = &self.drafts {
            let mut drafted = self.drafted(drafts, prompt, &settings, types)?;
            let mut writing = self.writing(rules);
            let mut sequence = Sequence {
                tokens: Vec::new(),
                score: 0.0,
            };
            for next in drafted.by_ref() {
                let (token, logprob) = next?;
                sequence.tokens.push(token);
                sequence.score += logprob;
                writing.push(token, hear)?;
                if writing.end.is_some() {
                    break;
                }
            }
            let done = writing.finish(sequence, drafted.cache_bytes(), hear)?;
            return Ok(Completion {
                drafts: Some(drafted.counts()),
                ..done
            });
        }
        let mut generator = CausalGenerator::with_cache(&self.model, &[prompt], &settings, types)?;
        let mut writing = self.writing(rules);
        for step in generator.by_ref() {
            let Some(token) = step?.tokens[0] else { break };
            writing.push(token, hear)?;
            if writing.end.is_some() {
                break;
            }
        }
        let sequence = generator.sequences()[0].clone();
        writing.finish(sequence, generator.cache_bytes(), hear)
    }

    /// Goes on with many prompts at once, in an empty batch; `hear` gets the number of the prompt that has a token
    /// more, or has ended. What is written for a prompt does not depend on the others. After an error none of them is
    /// left in the batch.
    ///
    /// # Errors
    /// As [`Batch::step`]; [`Error::Refused`] for an empty text to stop at; what `hear` returns.
    pub fn complete_batch(
        &self,
        batch: &mut Batch,
        requests: &[(&[u32], Rules)],
        hear: &mut dyn FnMut(usize, Heard) -> Result<()>,
    ) -> Result<()> {
        let settings: Vec<CausalSettings> = requests
            .iter()
            .map(|(_, rules)| self.settings(rules))
            .collect::<Result<_>>()?;
        let mut open: HashMap<RequestId, (usize, Writing)> = HashMap::new();
        for (ix, ((prompt, rules), settings)) in requests.iter().zip(&settings).enumerate() {
            open.insert(batch.add(prompt, settings), (ix, self.writing(rules)));
        }
        let done = follow(batch, &mut open, hear);
        for &id in open.keys() {
            batch.cancel(id)?;
        }
        done
    }

    fn drafted<'c>(
        &'c self,
        drafts: &'c Drafts,
        prompt: &[u32],
        settings: &CausalSettings,
        types: [DType; 2],
    ) -> Result<Speculative<'c>> {
        let vocab = self.model.spec().vocab;
        let drafter: Box<dyn Drafter> = match drafts {
            &Drafts::Ngram(tokens) => Box::new(Ngram { tokens }),
            Drafts::Model(model, tokens) => {
                let own = model.spec().vocab;
                if own != vocab {
                    let bound = format!("{vocab} tokens, as the model's");
                    return Err(Error::refused("the drafts' vocabulary", own, bound));
                }
                let longest = (prompt.len() as u32).saturating_add(settings.max_tokens);
                Box::new(ModelDrafter::new(model, *tokens, longest)?)
            }
        };
        Speculative::new(&self.model, prompt, settings, types, drafter)
    }

    fn settings(&self, rules: &Rules) -> Result<CausalSettings> {
        if rules.stop.iter().any(String::is_empty) {
            return Err(Error::refused("a text to stop at", "empty", "a text"));
        }
        Ok(CausalSettings {
            max_tokens: rules.max_tokens,
            eos: self.eos.clone(),
            sampling: rules.sampling,
            seed: rules.seed,
        })
    }

    fn writing<'c>(&'c self, rules: &'c Rules) -> Writing<'c> {
        Writing {
            eos: &self.eos,
            stop: &rules.stop,
            streaming: self.tokenizer.streaming(),
            text: String::new(),
            heard: 0,
            end: None,
        }
    }
}

/// Hears a batch to its end; whoever is answered is open no more.
fn follow(
    batch: &mut Batch,
    open: &mut HashMap<RequestId, (usize, Writing)>,
    hear: &mut dyn FnMut(usize, Heard) -> Result<()>,
) -> Result<()> {
    let bytes = batch.cache().bytes();
    let mut quiet = |_: &str| Ok(());
    while !batch.is_empty() {
        for event in batch.step()? {
            let (id, ended) = match event {
                Event::Token { request, token, .. } => {
                    let Some((ix, writing)) = open.get_mut(&request) else {
                        continue;
                    };
                    writing.push(token, &mut quiet)?;
                    hear(*ix, Heard::Token)?;
                    let stopped = matches!(writing.end, Some(End::Stop(_)));
                    let sequence = match stopped {
                        true => batch.cancel(request)?,
                        false => None,
                    };
                    match sequence {
                        Some(sequence) => (request, Ok(sequence)),
                        None => continue,
                    }
                }
                Event::Finished { request, sequence } => (request, Ok(sequence)),
                Event::Failed { request, error } => (request, Err(error)),
            };
            let Some((ix, writing)) = open.remove(&id) else {
                continue;
            };
            let done = match ended {
                Ok(sequence) => writing.finish(sequence, bytes, &mut quiet),
                Err(error) => Err(error),
            };
            hear(ix, Heard::Ended(done))?;
        }
    }
    Ok(())
}

/// A text as its tokens come.
struct Writing<'c> {
    eos: &'c [u32],
    stop: &'c [String],
    streaming: LmStreaming<'c>,
    text: String,
    /// How much of it was heard.
    heard: usize,
    end: Option<End>,
}

impl Writing<'_> {
    fn push(&mut self, token: u32, hear: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        if self.eos.contains(&token) {
            self.end = Some(End::Token(token));
            return Ok(());
        }
        self.text.push_str(&self.streaming.push(token));
        if let Some((at, stop)) = first_stop(&self.text, self.stop) {
            self.text.truncate(at);
            self.end = Some(End::Stop(stop.clone()));
            return Ok(());
        }
        let sure = self.text.len() - withheld(&self.text, self.stop);
        hear(&self.text[self.heard..sure])?;
        self.heard = sure;
        Ok(())
    }

    fn finish(
        mut self,
        sequence: Sequence,
        cache_bytes: u64,
        hear: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Completion> {
        if !matches!(self.end, Some(End::Stop(_))) {
            self.text.push_str(&self.streaming.finish());
        }
        if self.text.len() > self.heard {
            hear(&self.text[self.heard..])?;
        }
        Ok(Completion {
            text: self.text,
            tokens: sequence.tokens,
            score: sequence.score,
            end: self.end.unwrap_or(End::MaxTokens),
            cache_bytes,
            drafts: None,
        })
    }
}

/// The earliest of the texts to stop at, and where it begins.
fn first_stop<'s>(text: &str, stops: &'s [String]) -> Option<(usize, &'s String)> {
    let found = stops
        .iter()
        .filter_map(|stop| Some((text.find(stop)?, stop)));
    found.min_by_key(|&(at, _)| at)
}

/// Bytes at the end of a text with which a text to stop at may begin.
fn withheld(text: &str, stops: &[String]) -> usize {
    let begins = |from: &usize| stops.iter().any(|stop| stop.starts_with(&text[*from..]));
    let places = text.char_indices().map(|(at, _)| at);
    places
        .filter(|at| text.len() - at < stops.iter().map(String::len).max().unwrap_or(0))
        .find(begins)
        .map_or(0, |at| text.len() - at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_become_a_stop_is_withheld() {
        let stops = ["\n\n".to_string(), "END!".to_string()];
        for (text, wanted) in [
            ("", 0),
            ("abc", 0),
            ("abc\n", 1),
            ("abcE", 1),
            ("abcEN", 2),
            ("abcEND", 3),
            ("é\n", 1),
            ("ENé", 0),
        ] {
            assert_eq!(withheld(text, &stops), wanted, "{text:?}");
        }
        assert_eq!(withheld("abc", &[]), 0);
        let found = first_stop("a END! \n\n", &stops);
        assert_eq!(found, Some((2, &stops[1])));
        assert_eq!(first_stop("a END \n", &stops), None);
    }
}
