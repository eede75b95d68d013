//! Kernels as text: a template and its constants give WGSL. The whole value is the pipeline's key.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, OnceLock};

use super::checksum;
use crate::{Error, Result};

/// A constant of a variant, as the template sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Constant {
    /// A flag, `HAS_X`.
    Flag(bool),
    /// A size, `BLOCK_Q`.
    Size(u32),
    /// A type or a name of WGSL, `f16`.
    Word(&'static str),
    /// WGSL of the caller's.
    Text(Arc<str>),
    /// Storage buffers that a kernel reads: name and element type.
    Tables(Vec<(Arc<str>, &'static str)>),
}

impl From<bool> for Constant {
    fn from(value: bool) -> Self {
        Constant::Flag(value)
    }
}
impl From<u32> for Constant {
    fn from(value: u32) -> Self {
        Constant::Size(value)
    }
}
impl From<&'static str> for Constant {
    fn from(value: &'static str) -> Self {
        Constant::Word(value)
    }
}
impl From<Arc<str>> for Constant {
    fn from(value: Arc<str>) -> Self {
        Constant::Text(value)
    }
}
impl From<Vec<(Arc<str>, &'static str)>> for Constant {
    fn from(value: Vec<(Arc<str>, &'static str)>) -> Self {
        Constant::Tables(value)
    }
}

/// One variant of one kernel: the file's name under `shaders/` without its ending, and its constants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Shader {
    /// The kernel: its file, its label, its span.
    pub kernel: &'static str,
    constants: BTreeMap<&'static str, Constant>,
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$((concat!($name, ".wgsl"), include_str!(concat!("../../shaders/", $name, ".wgsl")))),*]
    };
}

/// Every text under `shaders/`, by name.
const SOURCES: &[(&str, &str)] = sources![
    "shared/activation",
    "shared/blocks",
    "shared/decode",
    "shared/linear",
    "shared/matrices",
    "shared/problem",
    "shared/rows",
    "shared/score",
    "shared/tile",
    "append",
    "block_map",
    "choose",
    "combine",
    "copy_page",
    "decode",
    "decode_lanes",
    "embed",
    "limits",
    "matmul",
    "matmul_coop",
    "merge",
    "norm",
    "pack",
    "prefill",
    "prefill_coop",
    "prefill_lanes",
    "reorder",
    "sample",
    "scores",
    "softmax",
    "values",
];

impl Shader {
    /// The kernel of that name, with no constants yet.
    pub fn new(kernel: &'static str) -> Self {
        Shader {
            kernel,
            constants: BTreeMap::new(),
        }
    }

    /// The same with one constant more.
    pub fn with(mut self, name: &'static str, value: impl Into<Constant>) -> Self {
        self.constants.insert(name, value.into());
        self
    }

    /// Whether it holds WGSL of the caller's.
    pub(crate) fn has_text(&self) -> bool {
        let mut constants = self.constants.values();
        constants.any(|value| matches!(value, Constant::Text(text) if !text.is_empty()))
    }

    /// The WGSL of this variant.
    pub fn expand(&self, templates: &minijinja::Environment<'static>) -> Result<String> {
        let context: BTreeMap<&str, minijinja::Value> = self
            .constants
            .iter()
            .map(|(name, value)| {
                let value = match value {
                    Constant::Flag(flag) => (*flag).into(),
                    Constant::Size(size) => (*size).into(),
                    Constant::Word(word) => (*word).into(),
                    Constant::Text(text) => text.to_string().into(),
                    Constant::Tables(tables) => tables
                        .iter()
                        .map(|(name, element)| {
                            vec![name.to_string(), "read".into(), element.to_string()]
                        })
                        .collect(),
                };
                (*name, value)
            })
            .collect();
        templates
            .get_template(&format!("{}.wgsl", self.kernel))
            .and_then(|template| template.render(context))
            .map_err(|e| Error::Device(format!("shaders/{}.wgsl: {e:#}", self.kernel)))
    }
}

/// The templates of every kernel. A name that a template uses and a variant lacks is an error. `BROWSER` tells
/// whom the text is for: browsers want `enable subgroups;`, which naga refuses.
pub fn templates() -> minijinja::Environment<'static> {
    let mut templates = minijinja::Environment::new();
    templates.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
    templates.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    templates.add_global("BROWSER", cfg!(target_family = "wasm"));
    for (name, text) in SOURCES {
        templates
            .add_template(name, text)
            .expect("the shaders' templates parse, which a test asserts");
    }
    templates
}

/// A number that changes with any text under `shaders/`.
pub(crate) fn fingerprint() -> u64 {
    static SUM: OnceLock<u64> = OnceLock::new();
    *SUM.get_or_init(|| {
        let texts = SOURCES.iter().flat_map(|(name, text)| [*name, *text]);
        checksum(texts.collect::<String>().as_bytes())
    })
}

/// Whether a kernel has a function, a type, a constant or a variable of that name at its outermost level, or calls one
/// of WGSL's own by it: a caller's would take its place in silence.
pub fn is_reserved(name: &str) -> bool {
    static NAMES: OnceLock<HashSet<&str>> = OnceLock::new();
    let names = NAMES.get_or_init(|| {
        let mut names = HashSet::new();
        for line in SOURCES.iter().flat_map(|(_, text)| text.lines()) {
            let words = line
                .strip_prefix("fn ")
                .or(line.strip_prefix("const "))
                .or(line.strip_prefix("struct "))
                .or(line.strip_prefix("alias "))
                .or(line
                    .split_once("var<")
                    .and_then(|(_, rest)| rest.split_once("> "))
                    .map(|(_, rest)| rest));
            let end = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
            names.extend(words.and_then(|rest| rest.split(end).next()));
            // What is called, `exp2(`, or made, `vec4<`.
            let calls = line.match_indices(['(', '<']).filter_map(|(at, _)| {
                let name = line[..at].rsplit(end).next()?;
                name.starts_with(|c: char| c.is_ascii_alphabetic())
                    .then_some(name)
            });
            names.extend(calls);
        }
        names.extend(["bool", "i32", "u32", "f32", "f16"]);
        // Tensors and tables, whose declarations are made from lists.
        names.extend([
            "q",
            "k",
            "v",
            "o",
            "weights",
            "stage",
            "lse",
            "parts",
            "block_map",
            "kv_len",
            "q_offset",
            "prefix_len",
            "cu_q",
            "cu_k",
            "rows",
            "pages",
            "bias",
            "mask",
            "alibi",
            "t5",
            "sinks",
            "tables",
            "qkv_calls",
        ]);
        names
    });
    names.contains(name)
}
