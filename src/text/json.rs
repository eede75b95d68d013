//! The crate `tokenizers`, which on some files panics where an error is due, when it reads them or not before it is
//! given a text: what is known to do so is checked first.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::{Error, Result};

/// The longest text of a charsmap, in bytes; those of sentencepiece's own have 33 at most.
const MAX_MAPPED: usize = 1024;

/// A tokenizer from its JSON; `path` names it in errors.
pub(super) fn read(path: &Path, json: &Value) -> Result<Box<Tokenizer>> {
    check(json).map_err(|what| Error::file(path, what))?;
    // Not a file's own text, which may say a thing twice: what is read is what was checked.
    let made = guarded(|| Tokenizer::from_bytes(json.to_string()));
    let mut inner = made.map_err(|what| Error::file(path, what))?;
    // Texts are cut and padded by nobody.
    inner.with_padding(None);
    inner
        .with_truncation(None)
        .map_err(|e| Error::file(path, e))?;
    Ok(Box::new(inner))
}

/// Token ids of a text; `whole` puts around it what the tokenizer's template says.
pub(super) fn encode(inner: &Tokenizer, text: &str, whole: bool) -> Result<Vec<u32>> {
    let encoding = guarded(|| inner.encode_fast(text, whole));
    let encoding =
        encoding.map_err(|what| Error::refused("the text", format_args!("{text:?}"), what))?;
    Ok(encoding.get_ids().to_vec())
}

/// For what no check here foresees: a panic is an error of the file. Nothing that it may have left half done is looked
/// at again: what is being made is dropped, and encoding only reads.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("the tokenizer broke off: its file must be damaged".into()),
    }
}

fn check(json: &Value) -> std::result::Result<(), String> {
    for map in maps(&json["normalizer"]) {
        let key = "precompiled_charsmap";
        if map.get("type").is_some_and(|ty| ty == "Precompiled") || map.contains_key(key) {
            let text = map.get(key).and_then(Value::as_str);
            let text = text.ok_or("its precompiled_charsmap is no text")?;
            let bytes = base64::decode(text);
            let bytes = bytes.map_err(|e| format!("its precompiled_charsmap is no base64: {e}"))?;
            charsmap(&bytes)?;
        }
    }
    for map in maps(&json["post_processor"]) {
        for piece in map
            .get("single")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let sequence = &piece["Sequence"]["id"];
            if !sequence.is_null() && sequence != "A" {
                return Err(format!(
                    "its template for one text has the sequence {sequence}"
                ));
            }
            let token = &piece["SpecialToken"]["id"];
            let known = |token: &str| map.get("special_tokens")?.get(token);
            if token.as_str().is_some_and(|token| known(token).is_none()) {
                return Err(format!("its template's special token {token} is not there"));
            }
        }
    }
    Ok(())
}

/// Every map within a value.
fn maps(value: &Value) -> Vec<&serde_json::Map<String, Value>> {
    let (own, inner): (_, Vec<&Value>) = match value {
        Value::Object(map) => (Some(map), map.values().collect()),
        Value::Array(list) => (None, list.iter().collect()),
        _ => (None, Vec::new()),
    };
    own.into_iter()
        .chain(inner.into_iter().flat_map(maps))
        .collect()
}

/// An error for a sentencepiece charsmap that a text would lead out of its bounds: the bytes of a double array (Aoe 1989)
/// of u32 behind their number, then the texts that it leads to, each with a zero behind it.
pub(super) fn charsmap(bytes: &[u8]) -> std::result::Result<(), String> {
    let wrong = |what: &str| Err(format!("its precompiled_charsmap {what}"));
    let Some((size, rest)) = bytes.split_first_chunk() else {
        return wrong("has no length");
    };
    let size = u32::from_le_bytes(*size) as usize;
    if size == 0 || !size.is_multiple_of(4) || size > rest.len() {
        let n = rest.len();
        return wrong(&format!(
            "has an array of {size} bytes in {n}; whole fours are wanted"
        ));
    }
    let (array, texts) = rest.split_at(size);
    let Ok(texts) = std::str::from_utf8(texts) else {
        return wrong("has texts that are no UTF-8");
    };
    let units: Vec<usize> = array
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&unit| u32::from_le_bytes(unit) as usize)
        .collect();
    for (at, &unit) in units.iter().enumerate() {
        // A value: no byte leads here, but for the root, where all begin.
        if at > 0 && unit >> 31 == 1 {
            continue;
        }
        let next = at ^ (unit >> 10 << ((unit & 1 << 9) >> 6));
        let ends = unit >> 8 & 1 == 1;
        let value = units.get(next).map(|value| value & ((1 << 31) - 1));
        if next | 0xff >= units.len() {
            return wrong(&format!("leads out of its array at {at}"));
        }
        if !ends {
            continue;
        }
        let Some(text) = value.and_then(|value| texts.get(value..)) else {
            return wrong(&format!("leads out of its texts at {at}"));
        };
        // Each character of a text may become one of these.
        if text
            .bytes()
            .take_while(|&byte| byte != 0)
            .nth(MAX_MAPPED)
            .is_some()
        {
            return wrong(&format!(
                "makes more than {MAX_MAPPED} bytes of a few, at {at}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error() {
        let said = guarded(|| -> tokenizers::Result<()> { panic!("this is caught") });
        assert!(said.unwrap_err().contains("broke off"));
        assert_eq!(guarded(|| Ok(7)), Ok(7));
    }
}
