//! Tokenizers of MarianMT directories: a sentencepiece unigram model with its vocabulary, or a
//! `tokenizer.json`. (Kudo 2018, "Subword Regularization"; the segmentation is the most likely one.)

use std::collections::HashMap;
use std::path::Path;

use sentencepiece_model::{ModelType, SentencePieceModel, Type};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;

use crate::{Error, Result};

const EOS: &str = "</s>";
const UNKNOWN: &str = "<unk>";
const PAD: &str = "<pad>";
/// Stands for a space in pieces.
const SPACE: char = '▁';

/// Languages by their two-letter and their three-letter codes (ISO 639-1 and 639-3).
const ALIASES: [(&str, &str); 2] = [("fr", "fra"), ("zh", "zho")];

/// Text to token ids and back.
pub struct Tokenizer {
    segmenter: Segmenter,
    ids: HashMap<String, u32>,
    pieces: Vec<String>,
    eos: u32,
    unknown: u32,
}

/// What cuts a text into pieces.
enum Segmenter {
    Sentencepiece {
        unigram: Box<Unigram>,
        charsmap: Option<Precompiled>,
        add_prefix: bool,
        collapse_spaces: bool,
        byte_fallback: bool,
    },
    Json(Box<tokenizers::Tokenizer>),
}

/// Reads a file of a model's directory; `None` where it is not there.
pub type ReadFile<'a> = &'a dyn Fn(&str) -> Result<Option<Vec<u8>>>;

impl Tokenizer {
    /// The tokenizer of a directory: `source.spm` and `vocab.json`, as MarianMT has them, or else
    /// `tokenizer.json`. `origin` names the directory in errors.
    ///
    /// # Errors
    /// [`Error::File`] for files that are missing or damaged, or a vocabulary without the special tokens.
    pub fn load(origin: &Path, read: ReadFile) -> Result<Tokenizer> {
        let (segmenter, ids) = match read("source.spm")? {
            Some(bytes) => {
                let segmenter = sentencepiece(&origin.join("source.spm"), &bytes)?;
                let path = origin.join("vocab.json");
                let bytes = read("vocab.json")?
                    .ok_or_else(|| Error::file(&path, "source.spm needs this file beside it"))?;
                let ids: HashMap<String, u32> =
                    serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, e))?;
                (segmenter, ids)
            }
            None => {
                let path = origin.join("tokenizer.json");
                let bytes = read("tokenizer.json")?.ok_or_else(|| {
                    let what =
                        "the model's directory has neither this file nor source.spm and vocab.json";
                    Error::file(&path, what)
                })?;
                let json =
                    tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::file(&path, e))?;
                let ids = json.get_vocab(true);
                (Segmenter::Json(Box::new(json)), ids)
            }
        };
        let name = match &segmenter {
            Segmenter::Sentencepiece { .. } => "vocab.json",
            Segmenter::Json(_) => "tokenizer.json",
        };
        let path = origin.join(name);
        let mut pieces = vec![String::new(); ids.len()];
        for (piece, &id) in &ids {
            let slot = pieces.get_mut(id as usize).ok_or_else(|| {
                let n = ids.len();
                Error::file(
                    &path,
                    format_args!("{piece:?} has the id {id}, of {n} in all"),
                )
            })?;
            if !slot.is_empty() {
                return Err(Error::file(
                    &path,
                    format_args!("{slot:?} and {piece:?} have one id, {id}"),
                ));
            }
            slot.clone_from(piece);
        }
        let special = |name: &str| {
            ids.get(name)
                .copied()
                .ok_or_else(|| Error::file(&path, format_args!("there is no {name}")))
        };
        Ok(Tokenizer {
            eos: special(EOS)?,
            unknown: special(UNKNOWN)?,
            segmenter,
            ids,
            pieces,
        })
    }

    /// The number of tokens.
    pub fn vocab(&self) -> u32 {
        self.pieces.len() as u32
    }

    /// The target languages that have a tag among the tokens, `fra` for `>>fra<<`, in order.
    pub fn languages(&self) -> Vec<&str> {
        let mut languages: Vec<&str> = self
            .pieces
            .iter()
            .filter_map(|piece| language(piece))
            .collect();
        languages.sort_unstable();
        languages
    }

    /// The tag of a language, by its code or the code's shorter or longer form.
    fn tag(&self, wanted: &str) -> Result<u32> {
        let forms = ALIASES.iter().flat_map(|&(short, long)| {
            let other = match wanted {
                wanted if wanted == short => Some(long),
                wanted if wanted == long => Some(short),
                _ => None,
            };
            other.into_iter()
        });
        let tags = [wanted]
            .into_iter()
            .chain(forms)
            .map(|code| format!(">>{code}<<"));
        for tag in tags {
            if let Some(&id) = self.ids.get(&tag) {
                return Ok(id);
            }
        }
        let bound = match self.languages().as_slice() {
            [] => "none: the model has one target language".to_string(),
            languages => format!("one of {}", languages.join(", ")),
        };
        Err(Error::refused(
            "the language",
            format_args!("{wanted:?}"),
            bound,
        ))
    }

    /// Token ids of a text: the language's tag if one is given, the pieces, the end token.
    ///
    /// # Errors
    /// [`Error::Refused`] for a language that the vocabulary has no tag of.
    pub fn encode(&self, text: &str, to: Option<&str>) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        if let Some(to) = to {
            ids.push(self.tag(to)?);
        }
        let failed = |e| Error::refused("the text", format_args!("{text:?}"), format!("{e}"));
        match &self.segmenter {
            Segmenter::Json(json) => {
                ids.extend(json.encode_fast(text, false).map_err(failed)?.get_ids());
            }
            Segmenter::Sentencepiece {
                unigram,
                charsmap,
                add_prefix,
                collapse_spaces,
                byte_fallback,
            } => {
                let mut text = match charsmap {
                    Some(charsmap) => charsmap.normalize_string(text),
                    None => text.to_string(),
                };
                if *collapse_spaces {
                    let words = text.split(' ').filter(|word| !word.is_empty());
                    text = words.collect::<Vec<_>>().join(" ");
                    // The sign for a space counts as one at the end of a text.
                    text.truncate(text.trim_end_matches([' ', SPACE]).len());
                }
                if !text.is_empty() {
                    if *add_prefix {
                        text.insert(0, ' ');
                    }
                    let text = text.replace(' ', "▁");
                    for piece in unigram.encode(&text).map_err(failed)? {
                        self.push_piece(&piece, *byte_fallback, &mut ids);
                    }
                }
            }
        }
        ids.push(self.eos);
        Ok(ids)
    }

    /// The id of a piece; its bytes' ids or the unknown token's where it has none.
    fn push_piece(&self, piece: &str, byte_fallback: bool, ids: &mut Vec<u32>) {
        if let Some(&id) = self.ids.get(piece) {
            ids.push(id);
            return;
        }
        let bytes: Option<Vec<u32>> = piece
            .bytes()
            .map(|byte| self.ids.get(&format!("<0x{byte:02X}>")).copied())
            .collect();
        match bytes {
            Some(bytes) if byte_fallback => ids.extend(bytes),
            _ => ids.push(self.unknown),
        }
    }

    /// The text of token ids. Special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut streaming = self.streaming();
        let mut text: String = ids.iter().filter_map(|&id| streaming.push(id)).collect();
        text.push_str(&streaming.finish());
        text.truncate(text.trim_end().len());
        text
    }

    /// A decoder that takes one token after the other.
    pub fn streaming(&self) -> Streaming<'_> {
        Streaming {
            tokenizer: self,
            bytes: Vec::new(),
            started: false,
        }
    }

    /// A token as it stands in the vocabulary.
    pub fn piece(&self, id: u32) -> &str {
        self.pieces.get(id as usize).map_or(UNKNOWN, String::as_str)
    }

    /// Whether a token is no part of a text: the end token, padding, the unknown one, a language's tag.
    pub fn is_special(&self, id: u32) -> bool {
        let piece = self.piece(id);
        [EOS, UNKNOWN, PAD, "<s>"].contains(&piece) || language(piece).is_some()
    }
}

/// Token ids to text as they come.
pub struct Streaming<'t> {
    tokenizer: &'t Tokenizer,
    /// Bytes of a character that is not whole yet.
    bytes: Vec<u8>,
    started: bool,
}

impl Streaming<'_> {
    /// What a token adds to the text; `None` where that is nothing yet.
    pub fn push(&mut self, id: u32) -> Option<String> {
        if self.tokenizer.is_special(id) {
            return None;
        }
        let piece = self.tokenizer.piece(id);
        let byte = piece
            .strip_prefix("<0x")
            .and_then(|rest| rest.strip_suffix('>'))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        let mut text = match byte {
            Some(byte) => {
                self.bytes.push(byte);
                let whole = std::str::from_utf8(&self.bytes).ok()?.to_string();
                self.bytes.clear();
                whole
            }
            None => self.finish() + &piece.replace(SPACE, " "),
        };
        if !self.started {
            text = text.trim_start_matches(' ').to_string();
            self.started = !text.is_empty();
        }
        Some(text).filter(|text| !text.is_empty())
    }

    /// What is left of a character that never became whole.
    fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.bytes).into_owned();
        self.bytes.clear();
        text
    }
}

/// `fra` of `>>fra<<`.
fn language(piece: &str) -> Option<&str> {
    piece
        .strip_prefix(">>")?
        .strip_suffix("<<")
        .filter(|code| !code.is_empty())
}

fn sentencepiece(path: &Path, bytes: &[u8]) -> Result<Segmenter> {
    let bad = |what: &dyn std::fmt::Display| Error::file(path, what);
    let model = SentencePieceModel::from_slice(bytes)
        .map_err(|e| bad(&format_args!("not a sentencepiece model: {e}")))?;
    let (Some(trainer), Some(normalizer)) = (model.trainer(), model.normalizer()) else {
        return Err(bad(
            &"a sentencepiece model without its trainer's or normalizer's settings",
        ));
    };
    if trainer.model_type() != ModelType::Unigram {
        let kind = trainer.model_type();
        return Err(bad(&format_args!(
            "a sentencepiece model of type {kind:?}; unigram models are read"
        )));
    }
    let pieces = model.pieces();
    let unknown = pieces
        .iter()
        .position(|piece| piece.r#type() == Type::Unknown);
    let vocab = pieces.iter().map(|piece| {
        // Control pieces must match no text: a character stands before them that is none.
        let text = match piece.r#type() {
            Type::Control | Type::Unknown => format!("\u{10ffff}{}", piece.piece()),
            _ => piece.piece().to_string(),
        };
        (text, piece.score() as f64)
    });
    let unigram = Unigram::from(vocab.collect(), unknown, false).map_err(|e| bad(&e))?;
    let charsmap = normalizer.precompiled_charsmap();
    Ok(Segmenter::Sentencepiece {
        unigram: Box::new(unigram),
        charsmap: match charsmap.is_empty() {
            true => None,
            false => Some(Precompiled::from(charsmap).map_err(|e| bad(&e))?),
        },
        add_prefix: normalizer.add_dummy_prefix(),
        collapse_spaces: normalizer.remove_extra_whitespaces(),
        byte_fallback: trainer.byte_fallback(),
    })
}
