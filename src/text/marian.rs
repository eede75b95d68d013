//! Tokenizers of MarianMT directories: a sentencepiece unigram model with its vocabulary, or a
//! `tokenizer.json`. (Kudo 2018, "Subword Regularization"; the segmentation is the most likely one.)

use std::collections::HashMap;
use std::path::Path;

use sentencepiece_model::{ModelType, SentencePieceModel, Type};
use tokenizers::Model;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::Precompiled;

use super::json;
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
    source: Vocabulary,
    /// The targets' vocabulary, where it is not the sources'.
    target: Option<Vocabulary>,
}

/// Pieces and their ids.
struct Vocabulary {
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
        let vocabulary = |name: &str, bytes: &[u8]| {
            let path = origin.join(name);
            let ids = serde_json::from_slice(bytes).map_err(|e| Error::file(&path, e))?;
            Vocabulary::new(&path, ids)
        };
        if let Some(bytes) = read("source.spm")? {
            let segmenter = sentencepiece(&origin.join("source.spm"), &bytes)?;
            let path = origin.join("vocab.json");
            let bytes = read("vocab.json")?
                .ok_or_else(|| Error::file(&path, "source.spm needs this file beside it"))?;
            return Ok(Tokenizer {
                segmenter,
                source: vocabulary("vocab.json", &bytes)?,
                target: match read("target_vocab.json")? {
                    Some(bytes) => Some(vocabulary("target_vocab.json", &bytes)?),
                    None => None,
                },
            });
        }
        let path = origin.join("tokenizer.json");
        let bytes = read("tokenizer.json")?.ok_or_else(|| {
            let what = "the model's directory has neither this file nor source.spm and vocab.json";
            Error::file(&path, what)
        })?;
        let description = serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, e))?;
        let inner = json::read(&path, &description)?;
        Ok(Tokenizer {
            source: Vocabulary::new(&path, inner.get_vocab(true))?,
            segmenter: Segmenter::Json(inner),
            target: None,
        })
    }

    /// Tokens of the source and of the target vocabulary.
    pub fn vocabularies(&self) -> [u32; 2] {
        [&self.source, self.target()].map(|vocabulary| vocabulary.pieces.len() as u32)
    }

    fn target(&self) -> &Vocabulary {
        self.target.as_ref().unwrap_or(&self.source)
    }

    /// The target languages that have a tag among the tokens, `fra` for `>>fra<<`, in order.
    pub fn languages(&self) -> Vec<&str> {
        let mut languages: Vec<&str> = self
            .source
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
            if let Some(&id) = self.source.ids.get(&tag) {
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
            Segmenter::Json(inner) => ids.extend(json::encode(inner, text, false)?),
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
                        // A run of unknown characters may spell a byte's piece.
                        let known = unigram.token_to_id(&piece).is_some();
                        self.push_piece(&piece, known, *byte_fallback, &mut ids);
                    }
                }
            }
        }
        ids.push(self.source.eos);
        Ok(ids)
    }

    /// The id of a piece; its bytes' ids or the unknown token's where it has none.
    fn push_piece(&self, piece: &str, known: bool, byte_fallback: bool, ids: &mut Vec<u32>) {
        let source = &self.source;
        if let (true, Some(&id)) = (known || !byte_fallback, source.ids.get(piece)) {
            ids.push(id);
            return;
        }
        let bytes: Option<Vec<u32>> = piece
            .bytes()
            .map(|byte| source.ids.get(&format!("<0x{byte:02X}>")).copied())
            .collect();
        match bytes {
            Some(bytes) if byte_fallback => ids.extend(bytes),
            _ => ids.push(source.unknown),
        }
    }

    /// The text of token ids. Special tokens are left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut streaming = self.streaming();
        let mut text: String = ids.iter().filter_map(|&id| streaming.push(id)).collect();
        text.push_str(&streaming.finish());
        text.trim().to_string()
    }

    /// A decoder that takes one token after the other.
    pub fn streaming(&self) -> Streaming<'_> {
        Streaming {
            tokenizer: self,
            bytes: Vec::new(),
            started: false,
        }
    }

    /// A target token as it stands in the vocabulary.
    pub fn piece(&self, id: u32) -> &str {
        self.target().piece(id)
    }

    /// A source token as it stands in the vocabulary.
    pub fn source_piece(&self, id: u32) -> &str {
        self.source.piece(id)
    }
}

/// Whether a piece is no part of a text: the end token, padding, the unknown one, a language's tag.
pub fn is_special(piece: &str) -> bool {
    [EOS, UNKNOWN, PAD, "<s>"].contains(&piece) || language(piece).is_some()
}

impl Vocabulary {
    fn new(path: &Path, ids: HashMap<String, u32>) -> Result<Self> {
        let mut pieces = vec![String::new(); ids.len()];
        for (piece, &id) in &ids {
            let slot = pieces.get_mut(id as usize).ok_or_else(|| {
                let n = ids.len();
                Error::file(
                    path,
                    format_args!("{piece:?} has the id {id}, of {n} in all"),
                )
            })?;
            if !slot.is_empty() {
                let what = format_args!("{slot:?} and {piece:?} have one id, {id}");
                return Err(Error::file(path, what));
            }
            slot.clone_from(piece);
        }
        let special = |name: &str| {
            let id = ids.get(name).copied();
            id.ok_or_else(|| Error::file(path, format_args!("there is no {name}")))
        };
        Ok(Vocabulary {
            eos: special(EOS)?,
            unknown: special(UNKNOWN)?,
            ids,
            pieces,
        })
    }

    fn piece(&self, id: u32) -> &str {
        self.pieces.get(id as usize).map_or(UNKNOWN, String::as_str)
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
        let piece = self.tokenizer.piece(id);
        if is_special(piece) {
            return None;
        }
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
    pub fn finish(&mut self) -> String {
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
        // These match no text, whatever it says: a character stands before them that is none.
        let text = match piece.r#type() {
            Type::Control | Type::Unknown | Type::Byte => format!("\u{10ffff}{}", piece.piece()),
            _ => piece.piece().to_string(),
        };
        (text, piece.score() as f64)
    });
    let unigram = Unigram::from(vocab.collect(), unknown, false).map_err(|e| bad(&e))?;
    let charsmap = normalizer.precompiled_charsmap();
    if !charsmap.is_empty() {
        json::charsmap(charsmap).map_err(|what| bad(&what))?;
    }
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
