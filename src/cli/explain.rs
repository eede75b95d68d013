//! What the steps attended to, for people: in words, as JSON, as a picture.

use std::fmt::Write;
use std::path::Path;

use qkv::Result;
use qkv::text::{Tokenizer, is_special};
use qkv::translate::Attention;

use super::picture::{self, Map};

/// Which layer and head a picture shows; the mean over those not named.
#[derive(Clone, Copy)]
pub struct Shown {
    pub layer: Option<usize>,
    pub head: Option<usize>,
}

/// A word that some columns of attention belong to.
struct Word {
    text: String,
    columns: std::ops::Range<usize>,
}

/// A token as people read it.
fn label(piece: &str) -> String {
    match piece.trim_start_matches('▁') {
        "" => "▁".into(),
        text => text.into(),
    }
}

fn source_pieces<'t>(tokenizer: &'t Tokenizer, attention: &Attention) -> Vec<&'t str> {
    let source = attention.source.iter();
    source.map(|&id| tokenizer.source_piece(id)).collect()
}

fn written_pieces<'t>(tokenizer: &'t Tokenizer, attention: &Attention) -> Vec<&'t str> {
    let written = attention.written.iter();
    written.map(|&id| tokenizer.piece(id)).collect()
}

/// What the decoder had read: the start token under a name of its own, then what it wrote.
fn read_pieces<'t>(tokenizer: &'t Tokenizer, attention: &Attention) -> Vec<&'t str> {
    let written = attention.read[1..].iter().map(|&id| tokenizer.piece(id));
    std::iter::once(START).chain(written).collect()
}

/// Han, kana and full-width forms are written without spaces: each piece counts as a word.
fn is_cjk(text: &str) -> bool {
    text.chars().any(|c| matches!(c, '\u{2e80}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{ff00}'..='\u{ffef}' | '\u{20000}'..='\u{3ffff}'))
}

/// The pieces put together as words, by the sign that marks a word's start.
fn words(pieces: &[&str]) -> Vec<Word> {
    let mut words: Vec<Word> = Vec::new();
    for (ix, piece) in pieces.iter().enumerate() {
        // Punctuation stands alone, but for what joins the parts of a word.
        let joint = piece.chars().all(|c| matches!(c, '\'' | '-' | '’'));
        let sign = !joint && !piece.chars().any(char::is_alphanumeric);
        let own = piece.starts_with('▁') || sign || is_special(piece) || is_cjk(piece);
        let joins = |word: &Word| {
            let before = pieces[word.columns.start];
            let letters = word.text.chars().any(char::is_alphanumeric);
            letters && !is_special(before) && before != START && !is_cjk(&word.text)
        };
        match words.last_mut() {
            Some(word) if !own && joins(word) => {
                word.text.push_str(&label(piece));
                word.columns.end = ix + 1;
            }
            _ => words.push(Word {
                text: label(piece),
                columns: ix..ix + 1,
            }),
        }
    }
    words
}

/// What the first input of the decoder is called.
const START: &str = "(start)";

/// A row's words with the weight on each, heaviest first.
fn heaviest<'w>(words: &'w [Word], row: &[f32]) -> Vec<(&'w str, f32)> {
    let mut weights: Vec<(&str, f32)> = words
        .iter()
        .filter(|word| word.columns.start < row.len())
        .map(|word| {
            let columns = word.columns.start..word.columns.end.min(row.len());
            (word.text.as_str(), row[columns].iter().sum())
        })
        .collect();
    weights.sort_by(|a, b| b.1.total_cmp(&a.1));
    weights
}

/// A step's heaviest source words and earlier target words.
struct Row<'w> {
    token: String,
    source: Vec<(&'w str, f32)>,
    written: Vec<(&'w str, f32)>,
}

fn rows<'w>(
    tokenizer: &Tokenizer,
    attention: &Attention,
    source: &'w [Word],
    read: &'w [Word],
) -> Vec<Row<'w>> {
    let (n, columns) = (attention.written.len(), attention.source.len());
    (0..n)
        .map(|step| Row {
            token: label(tokenizer.piece(attention.written[step])),
            source: heaviest(
                source,
                &attention.cross[step * columns..(step + 1) * columns],
            ),
            written: heaviest(read, &attention.own[step * n..step * n + step + 1]),
        })
        .collect()
}

/// The steps as a table.
pub fn text(tokenizer: &Tokenizer, attention: &Attention, decoder_steps: u32) -> String {
    let source = words(&source_pieces(tokenizer, attention));
    let read = words(&read_pieces(tokenizer, attention));
    let mut out = String::new();
    let (n, tokens) = (attention.source.len(), attention.written.len());
    let _ = writeln!(
        out,
        "1 encoder step over {n} tokens, {decoder_steps} decoder steps, {tokens} tokens written"
    );
    let shown = |weights: &[(&str, f32)]| {
        let parts: Vec<String> = weights
            .iter()
            .take(3)
            .map(|(word, weight)| format!("{word} {weight:.2}"))
            .collect();
        parts.join(", ")
    };
    for (step, row) in rows(tokenizer, attention, &source, &read)
        .iter()
        .enumerate()
    {
        let (step, token) = (step + 1, &row.token);
        let _ = writeln!(
            out,
            "{step:>4}  {token}\n      source   {}\n      written  {}",
            shown(&row.source),
            shown(&row.written)
        );
    }
    out
}

/// The steps as JSON, with every word's weight.
pub fn json(tokenizer: &Tokenizer, attention: &Attention) -> serde_json::Value {
    let source = words(&source_pieces(tokenizer, attention));
    let read = words(&read_pieces(tokenizer, attention));
    let list = |weights: &[(&str, f32)]| -> serde_json::Value {
        let pairs = weights.iter();
        pairs
            .map(|(word, weight)| serde_json::json!({ "word": word, "weight": weight }))
            .collect()
    };
    rows(tokenizer, attention, &source, &read)
        .iter()
        .map(|row| serde_json::json!({ "token": row.token, "source": list(&row.source), "written": list(&row.written) }))
        .collect()
}

/// The maps of cross- and self-attention as a picture.
pub fn draw(
    tokenizer: &Tokenizer,
    attention: &Attention,
    shown: Shown,
    caption: &str,
    font: Option<&Path>,
    out: &Path,
) -> Result<()> {
    let labels = |pieces: Vec<&str>| pieces.into_iter().map(label).collect::<Vec<_>>();
    let which = match (shown.layer, shown.head) {
        (None, None) => "mean over layers and heads".to_string(),
        (Some(layer), None) => format!("layer {layer}, mean over heads"),
        (None, Some(head)) => format!("head {head}, mean over layers"),
        (Some(layer), Some(head)) => format!("layer {layer}, head {head}"),
    };
    let maps = [
        Map {
            title: format!("cross-attention ({which})"),
            rows: labels(written_pieces(tokenizer, attention)),
            columns: labels(source_pieces(tokenizer, attention)),
            weights: attention.cross.clone(),
        },
        Map {
            title: "self-attention".to_string(),
            rows: labels(written_pieces(tokenizer, attention)),
            columns: labels(read_pieces(tokenizer, attention)),
            weights: attention.own.clone(),
        },
    ];
    picture::draw(&maps, caption, font, out)
}
