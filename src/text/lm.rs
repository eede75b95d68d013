//! Tokenizers of decoder-only models: out of a GGUF file's metadata or a `tokenizer.json`. Byte-level BPE
//! (Radford et al. 2019) and sentencepiece's BPE with bytes for what has no piece (Kudo and Richardson 2018).

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Value, json};

use super::{ReadFile, json};
use crate::gguf::{Header, List};
use crate::{Error, Result};

/// Stands for a space in sentencepiece's pieces.
const SPACE: char = '▁';

/// The longest of sentencepiece's pieces that is read, in bytes; its own default is 16 characters.
const MAX_PIECE: usize = 1024;

// How texts are cut before merging, by the names that llama.cpp gives.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Tokens that end a text or a turn by their spelling: many GGUF files name one of several. The list is llama.cpp's.
const ENDS: [&str; 22] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];

/// Text to token ids and back.
pub struct LmTokenizer {
    inner: Box<tokenizers::Tokenizer>,
    spelling: Spelling,
    /// Put before and after a text, beside what `inner` adds.
    around: [Vec<u32>; 2],
    bos: Option<u32>,
    ends: Vec<u32>,
    special: HashSet<u32>,
    /// Bytes that the vocabulary has no token for, nor one for what is unknown.
    lacking: Vec<u8>,
}

/// How tokens spell bytes.
#[derive(Clone, Copy)]
enum Spelling {
    /// A letter of GPT-2's alphabet for each byte.
    Letters,
    /// UTF-8 with [`SPACE`], and `<0xE2>` for single bytes. A space at the beginning of a text was put
    /// there by the tokenizer, if `prefix`.
    Pieces { prefix: bool },
}

impl LmTokenizer {
    /// The tokenizer that a GGUF file describes under `tokenizer.ggml`: byte-level BPE (`gpt2`) or
    /// sentencepiece's (`llama`).
    ///
    /// # Errors
    /// [`Error::File`] for what is missing, of another kind, or contradicts itself.
    pub fn from_gguf(header: &Header) -> Result<LmTokenizer> {
        let must = |key: &str| header.error(format_args!("it has no {key}"));
        let key = "tokenizer.ggml.tokens";
        let tokens = header.texts(key)?.ok_or_else(|| must(key))?;
        let ids = ids_of(header, tokens)?;
        let kinds = kinds_of(header, tokens.len())?;
        let key = "tokenizer.ggml.model";
        let (description, spelling, mut bos_first) =
            match header.text(key)?.ok_or_else(|| must(key))? {
                "gpt2" => {
                    let (description, bos_first) = byte_level(header, &ids)?;
                    (description, Spelling::Letters, bos_first)
                }
                "llama" => {
                    let prefix = header.flag("tokenizer.ggml.add_space_prefix")?;
                    let prefix = prefix.unwrap_or(true);
                    let description = sentencepiece(header, tokens, &ids, prefix)?;
                    (description, Spelling::Pieces { prefix }, true)
                }
                other => {
                    let what = format_args!("{key} is {other:?}; gpt2 and llama are read");
                    return Err(header.error(what));
                }
            };
        let named = |name: &str| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            match header.u32(&key)? {
                Some(id) if id as usize >= tokens.len() => {
                    let n = tokens.len();
                    Err(header.error(format_args!("{key} is {id}, of {n} tokens in all")))
                }
                id => Ok(id),
            }
        };
        let (bos, eos) = (named("bos")?, named("eos")?);
        let mut ends: Vec<u32> = eos.into_iter().collect();
        for name in ["eot", "eom", "fim_pad", "fim_rep", "fim_sep"] {
            ends.extend(named(name)?);
        }
        ends.extend(ENDS.iter().filter_map(|&token| ids.get(token)));
        ends.sort_unstable();
        ends.dedup();
        let named = [bos, named("unknown")?, named("padding")?];
        // Control tokens and unknown ones are no text, nor are ends of any kind. They and those the user defined are
        // never cut.
        let special = |id: u32, kind: i64| {
            matches!(kind, 2 | 3) || named.contains(&Some(id)) || ends.contains(&id)
        };
        let added: Vec<Value> = (0..)
            .zip(tokens.iter().zip(&kinds))
            .filter(|&(id, (_, &kind))| kind == 4 || special(id, kind))
            .map(|(id, (token, &kind))| {
                json!({
                    "id": id, "content": token, "special": special(id, kind), "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                })
            })
            .collect();
        let description = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "post_processor": null, "added_tokens": added,
            "model": description.model, "pre_tokenizer": description.pre_tokenizer,
            "decoder": null,
        });
        if let Some(flag) = header.flag("tokenizer.ggml.add_bos_token")? {
            bos_first = flag;
        }
        let eos_last = header.flag("tokenizer.ggml.add_eos_token")? == Some(true);
        let put = |wanted: bool, id: Option<u32>, name: &str| match (wanted, id) {
            (false, _) => Ok(Vec::new()),
            (true, Some(id)) => Ok(vec![id]),
            (true, None) => Err(must(&format!("tokenizer.ggml.{name}_token_id"))),
        };
        Ok(LmTokenizer {
            inner: json::read(header.path(), &description)?,
            spelling,
            around: [put(bos_first, bos, "bos")?, put(eos_last, eos, "eos")?],
            bos,
            special: (0..)
                .zip(&kinds)
                .filter(|&(id, &kind)| special(id, kind))
                .map(|(id, _)| id)
                .collect(),
            ends,
            lacking: match spelling {
                Spelling::Letters => lacking(|token| ids.contains_key(token)),
                Spelling::Pieces { .. } => Vec::new(),
            },
        })
    }

    /// The tokenizer of a Hugging Face directory: `tokenizer.json`, with the names of the tokens at a text's
    /// beginning and end in `tokenizer_config.json`. `origin` names the directory in errors.
    ///
    /// # Errors
    /// [`Error::File`] for files that are missing, damaged, or of a kind that cannot be decoded token by token.
    pub fn load(origin: &Path, read_file: ReadFile) -> Result<LmTokenizer> {
        let path = origin.join("tokenizer.json");
        let bytes = read_file("tokenizer.json")?
            .ok_or_else(|| Error::file(&path, "the model's directory lacks this file"))?;
        let description: Value =
            serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, e))?;
        let inner = json::read(&path, &description)?;
        let spelling = spelling(&description["decoder"]).ok_or_else(|| {
            let kind = &description["decoder"]["type"];
            let what = "ByteLevel, and Metaspace or ByteFallback are read";
            Error::file(&path, format_args!("its decoder is {kind}; {what}"))
        })?;
        let config = match read_file("tokenizer_config.json")? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::file(origin.join("tokenizer_config.json"), e))?,
            None => Value::Null,
        };
        let special = |name: &str| {
            let token = &config[name];
            let token = token.as_str().or(token["content"].as_str())?;
            inner.token_to_id(token)
        };
        let added = inner.get_added_tokens_decoder();
        let drops = description["model"]["unk_token"].is_null();
        Ok(LmTokenizer {
            lacking: match spelling {
                Spelling::Letters if drops => lacking(|token| inner.token_to_id(token).is_some()),
                _ => Vec::new(),
            },
            spelling,
            around: [Vec::new(), Vec::new()],
            bos: special("bos_token"),
            ends: special("eos_token").into_iter().collect(),
            special: added
                .iter()
                .filter(|(_, token)| token.special)
                .map(|(&id, _)| id)
                .collect(),
            inner,
        })
    }

    /// Tokens there are.
    pub fn len(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token that begins texts, where there is one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end texts or turns.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// A token as the vocabulary spells it; `None` for ids that are none.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether a token is no text: the beginning, the end, a turn's marks.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Token ids of a text. Special tokens that the text spells are themselves. `whole` puts around it what
    /// the model wants around a whole text, its beginning for one; texts of a chat template have it already.
    ///
    /// # Errors
    /// [`Error::Refused`] for a text with a byte that the vocabulary has no token for.
    pub fn encode(&self, text: &str, whole: bool) -> Result<Vec<u32>> {
        if let Some(byte) = text.bytes().find(|byte| self.lacking.contains(byte)) {
            let bound = format!("the vocabulary has no token for the byte 0x{byte:02X}");
            return Err(Error::refused("the text", format_args!("{text:?}"), bound));
        }
        let ids = json::encode(&self.inner, text, whole)?;
        let [before, after] = match whole {
            true => [&self.around[0][..], &self.around[1][..]],
            false => [&[][..], &[][..]],
        };
        Ok([before, &ids, after].concat())
    }

    /// The text of token ids, without special tokens. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut streaming = self.streaming();
        let mut text: String = ids.iter().map(|&id| streaming.push(id)).collect();
        text.push_str(&streaming.finish());
        text
    }

    /// A decoder that takes one token after the other.
    pub fn streaming(&self) -> LmStreaming<'_> {
        LmStreaming {
            tokenizer: self,
            bytes: Vec::new(),
            started: false,
        }
    }

    /// The bytes that a token stands for.
    fn bytes(&self, id: u32) -> Vec<u8> {
        let token = self.inner.id_to_token(id).unwrap_or_default();
        match self.spelling {
            Spelling::Letters => {
                // Added tokens stand for themselves where they are not spelled in the alphabet.
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
                bytes.unwrap_or_else(|| token.into_bytes())
            }
            Spelling::Pieces { .. } => match byte_piece(&token) {
                Some(byte) => vec![byte],
                None => token.replace(SPACE, " ").into_bytes(),
            },
        }
    }
}

/// Token ids to text as they come. Bytes of a character that is not whole yet are held back.
pub struct LmStreaming<'t> {
    tokenizer: &'t LmTokenizer,
    bytes: Vec<u8>,
    started: bool,
}

impl LmStreaming<'_> {
    /// What a token adds to the text, which may be nothing yet.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokenizer.is_special(id) {
            return String::new();
        }
        let mut bytes = self.tokenizer.bytes(id);
        if !self.started && !bytes.is_empty() {
            self.started = true;
            if bytes[0] == b' '
                && matches!(self.tokenizer.spelling, Spelling::Pieces { prefix: true })
            {
                bytes.remove(0);
            }
        }
        self.bytes.extend(bytes);
        let mut text = String::new();
        let mut taken = 0;
        for chunk in self.bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            taken += chunk.valid().len();
            let invalid = chunk.invalid();
            let ends = taken + invalid.len() == self.bytes.len();
            if invalid.is_empty() || ends && may_become_whole(invalid) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
        self.bytes.drain(..taken);
        text
    }

    /// What is left of a character that never became whole.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.bytes).into_owned();
        self.bytes.clear();
        text
    }
}

/// Whether more bytes could make these a character.
fn may_become_whole(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(e) if e.error_len().is_none())
}

/// How a `tokenizer.json`'s decoder reads tokens.
fn spelling(decoder: &Value) -> Option<Spelling> {
    let alone = std::slice::from_ref(decoder);
    let steps = decoder["decoders"].as_array().map_or(alone, Vec::as_slice);
    let step = |kind: &str| steps.iter().find(|step| step["type"] == kind);
    if step("ByteLevel").is_some() {
        return Some(Spelling::Letters);
    }
    let prefix = match (step("Metaspace"), step("ByteFallback")) {
        (None, None) => return None,
        (Some(metaspace), _) => metaspace["prepend_scheme"] != "never",
        (None, _) => step("Strip").is_some_and(|strip| strip["start"] != 0),
    };
    Some(Spelling::Pieces { prefix })
}

/// A tokenizer's parts, as `tokenizer.json` has them.
struct Description {
    model: Value,
    pre_tokenizer: Value,
}

fn ids_of<'h>(header: &Header, tokens: &'h [String]) -> Result<HashMap<&'h str, u32>> {
    let mut ids = HashMap::new();
    for (id, token) in (0..).zip(tokens) {
        if let Some(first) = ids.insert(token.as_str(), id) {
            let what =
                format_args!("tokenizer.ggml.tokens has {token:?} twice, at {first} and {id}");
            return Err(header.error(what));
        }
    }
    Ok(ids)
}

/// What each token is: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 a byte.
fn kinds_of(header: &Header, n: usize) -> Result<Vec<i64>> {
    let key = "tokenizer.ggml.token_type";
    let kinds = match header.list(key)? {
        None => vec![1; n],
        Some(List::Signed(kinds)) => kinds.clone(),
        Some(List::Unsigned(kinds)) => kinds.iter().map(|&kind| kind as i64).collect(),
        Some(_) => return Err(header.error(format_args!("{key} is not a list of integers"))),
    };
    match kinds.len() == n {
        true => Ok(kinds),
        false => Err(header.error(format_args!(
            "{key} has {} entries for {n} tokens",
            kinds.len()
        ))),
    }
}

/// Byte-level BPE, and whether texts begin with a token of their own where nothing says otherwise.
fn byte_level(header: &Header, ids: &HashMap<&str, u32>) -> Result<(Description, bool)> {
    if header.flag("tokenizer.ggml.add_space_prefix")? == Some(true) {
        let what = "tokenizer.ggml.add_space_prefix is true; false is wanted with byte-level BPE";
        return Err(header.error(what));
    }
    let key = "tokenizer.ggml.merges";
    let merges = header.texts(key)?;
    let merges = merges.ok_or_else(|| header.error(format_args!("it has no {key}")))?;
    let mut pairs = Vec::new();
    for merge in merges {
        let pair = merge.split_once(' ').filter(|(left, right)| {
            ids.contains_key(left)
                && ids.contains_key(right)
                && ids.contains_key(format!("{left}{right}").as_str())
        });
        let Some((left, right)) = pair else {
            let what = format_args!("{key} has {merge:?}, which are not two tokens that make one");
            return Err(header.error(what));
        };
        pairs.push([left, right]);
    }
    let key = "tokenizer.ggml.pre";
    let name = header.text(key)?.unwrap_or_else(|| {
        let path = header.path().display();
        tracing::warn!("{path} has no {key}: texts are cut as GPT-2 cuts them");
        "default"
    });
    let plain = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let after = |first: Value, regex: bool| {
        let mut bytes = plain.clone();
        bytes["use_regex"] = regex.into();
        json!({"type": "Sequence", "pretokenizers": [first, bytes]})
    };
    let split = |regex: &str| {
        let pattern = json!({"Regex": regex});
        after(
            json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false}),
            false,
        )
    };
    // Whether a piece that is a token needs no merges, and whether texts begin with a token of their own.
    let (pre_tokenizer, whole, bos_first) = match name {
        "default" | "gpt-2" => (plain, false, false),
        "smollm" => (
            after(json!({"type": "Digits", "individual_digits": true}), true),
            false,
            false,
        ),
        "llama-bpe" | "llama3" | "llama-v3" => (split(LLAMA_3), true, true),
        "tekken" => (split(TEKKEN), true, true),
        "qwen2" | "deepseek-r1-qwen" => (split(QWEN_2), false, false),
        other => {
            let known = "default, gpt-2, smollm, llama-bpe, tekken and qwen2 are known";
            let what = format_args!("tokenizer.ggml.pre is {other:?}; {known}");
            return Err(header.error(what));
        }
    };
    let model = json!({
        "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": whole,
        "vocab": ids, "merges": pairs,
    });
    Ok((
        Description {
            model,
            pre_tokenizer,
        },
        bos_first,
    ))
}

/// Sentencepiece's BPE, whose merges follow from the scores: the best token first, and every way to cut it
/// into two tokens.
fn sentencepiece(
    header: &Header,
    tokens: &[String],
    ids: &HashMap<&str, u32>,
    prefix: bool,
) -> Result<Description> {
    let unknown = header.u32("tokenizer.ggml.unknown_token_id")?;
    let unknown = unknown.and_then(|id| tokens.get(id as usize));
    let bytes = (0..=255).all(|byte| ids.contains_key(format!("<0x{byte:02X}>").as_str()));
    if !bytes && unknown.is_none() {
        let what = "its vocabulary has neither a token for every byte nor one for what is unknown";
        return Err(header.error(what));
    }
    let key = "tokenizer.ggml.scores";
    let scores = match header.list(key)? {
        Some(List::Floats(scores)) if scores.len() == tokens.len() => scores,
        _ => {
            let what = format_args!("{key} is not a list of {} floats", tokens.len());
            return Err(header.error(what));
        }
    };
    let mut merges = Vec::new();
    for (token, &score) in tokens.iter().zip(scores) {
        if score.is_nan() {
            return Err(header.error(format_args!("the score of {token:?} is {score}")));
        }
        // Every way to cut a token is looked up, so that a long one would take the square of its length.
        if token.len() > MAX_PIECE {
            let n = token.len();
            let what = format_args!("a token of {n} bytes; {MAX_PIECE} at most is wanted");
            return Err(header.error(what));
        }
        let mut ways: Vec<([u32; 2], [&str; 2])> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some(([*ids.get(left)?, *ids.get(right)?], [left, right]))
            })
            .collect();
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|(_, [left, right])| {
            let lengths = [left.chars().count(), right.chars().count()];
            (score, lengths, [left, right])
        }));
    }
    // Of one score, the longer left part first, then the longer right one; then as they stand.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
    let merges: Vec<[&str; 2]> = merges.into_iter().map(|(_, _, pair)| pair).collect();
    Ok(Description {
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": bytes, "ignore_merges": false,
            "vocab": ids, "merges": merges,
        }),
        pre_tokenizer: json!({
            "type": "Metaspace", "replacement": SPACE, "split": false,
            "prepend_scheme": if prefix { "first" } else { "never" },
        }),
    })
}

/// Whether GPT-2's alphabet has a byte as the character of that code: those that print, and are no space.
fn prints(byte: u8) -> bool {
    matches!(byte, 33..=126 | 161..=172 | 174..=255)
}

/// The letter of a byte: itself where it prints; the others are counted from U+0100 on.
fn letter(byte: u8) -> char {
    let code = match prints(byte) {
        true => byte as u32,
        false => 256 + (0..byte).filter(|&other| !prints(other)).count() as u32,
    };
    char::from_u32(code).expect("there are no surrogates below U+0200")
}

/// The bytes whose letters are no tokens.
fn lacking(has: impl Fn(&str) -> bool) -> Vec<u8> {
    let lacks = |byte: &u8| !has(letter(*byte).encode_utf8(&mut [0; 4]));
    (0..=255).filter(lacks).collect()
}

/// The byte of a letter.
fn byte_of(letter: char) -> Option<u8> {
    match letter as u32 {
        code @ 0..=255 => Some(code as u8).filter(|&byte| prints(byte)),
        code => (0..=255)
            .filter(|&byte| !prints(byte))
            .nth(code as usize - 256),
    }
}

/// 0xE2 of `<0xE2>`.
fn byte_piece(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    match digits.len() {
        2 => u8::from_str_radix(digits, 16).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_letter_of_its_own() {
        for byte in 0..=255 {
            assert_eq!(byte_of(letter(byte)), Some(byte));
        }
        assert_eq!((letter(b' '), letter(b'\n'), letter(0xad)), ('Ġ', 'Ċ', 'Ń'));
        assert_eq!((byte_of(' '), byte_of('ń')), (None, None));
    }
}
