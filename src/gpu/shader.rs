//! Kernels as text: a template and its constants give WGSL. The whole value is the pipeline's key.

use std::collections::BTreeMap;

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
    "shared/linear",
    "shared/problem",
    "shared/rows",
    "shared/score",
    "append",
    "choose",
    "decode",
    "embed",
    "matmul",
    "matvec",
    "merge",
    "norm",
    "prefill",
    "reorder",
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

/// The templates of every kernel. A name that a template uses and a variant lacks is an error.
pub fn templates() -> minijinja::Environment<'static> {
    let mut templates = minijinja::Environment::new();
    templates.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
    templates.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    for (name, text) in SOURCES {
        templates
            .add_template(name, text)
            .expect("the shaders' templates parse, which a test asserts");
    }
    templates
}
