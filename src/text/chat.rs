//! Chat templates: Jinja, as Hugging Face's tokenizers render them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, ErrorKind, Value, context};

use super::ReadFile;
use crate::gguf::Header;
use crate::{Error, Result};

const NAME: &str = "chat template";

/// Instructions that one rendering may take: chats of a million messages pass, endless loops do not.
const FUEL: u64 = 200_000_000;

/// A turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whose turn: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// A model's way to write a chat as one text.
pub struct ChatTemplate {
    path: PathBuf,
    templates: Environment<'static>,
    /// Names of special tokens, and the tokens.
    tokens: BTreeMap<String, String>,
}

impl ChatTemplate {
    /// The template of a GGUF file, `tokenizer.chat_template`; `None` where it has none.
    ///
    /// # Errors
    /// [`Error::File`] for one that cannot be read.
    pub fn from_gguf(header: &Header) -> Result<Option<ChatTemplate>> {
        let Some(text) = header.text("tokenizer.chat_template")? else {
            return Ok(None);
        };
        let all = header.texts("tokenizer.ggml.tokens")?.unwrap_or_default();
        let mut tokens = BTreeMap::new();
        for (name, key) in [
            ("bos", "bos"),
            ("eos", "eos"),
            ("unk", "unknown"),
            ("pad", "padding"),
        ] {
            let id = header.u32(&format!("tokenizer.ggml.{key}_token_id"))?;
            if let Some(token) = id.and_then(|id| all.get(id as usize)) {
                tokens.insert(format!("{name}_token"), token.clone());
            }
        }
        ChatTemplate::new(header.path(), text, tokens).map(Some)
    }

    /// The template of a Hugging Face directory: `chat_template.jinja`, or else `chat_template` in
    /// `tokenizer_config.json`; `None` where there is neither.
    ///
    /// # Errors
    /// [`Error::File`] for one that cannot be read.
    pub fn load(origin: &Path, read: ReadFile) -> Result<Option<ChatTemplate>> {
        let path = origin.join("tokenizer_config.json");
        let config: serde_json::Value = match read("tokenizer_config.json")? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, e))?,
            None => serde_json::Value::Null,
        };
        let mut tokens = BTreeMap::new();
        for name in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            let token = config[name].as_str().or(config[name]["content"].as_str());
            tokens.extend(token.map(|token| (name.to_string(), token.to_string())));
        }
        if let Some(bytes) = read("chat_template.jinja")? {
            let path = origin.join("chat_template.jinja");
            let text = String::from_utf8(bytes).map_err(|e| Error::file(&path, e))?;
            return ChatTemplate::new(&path, &text, tokens).map(Some);
        }
        let template = &config["chat_template"];
        // Where there are several, they have names.
        let default = template.as_array().and_then(|all| {
            let default = all.iter().find(|one| one["name"] == "default");
            default?["template"].as_str()
        });
        match template.as_str().or(default) {
            Some(text) => ChatTemplate::new(&path, text, tokens).map(Some),
            None if template.is_null() => Ok(None),
            None => Err(Error::file(
                path,
                "its chat_template is no text, nor is there a default one",
            )),
        }
    }

    /// A template from its text; `tokens` are variables of it, `bos_token` for one. `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::File`] for a text that is no template.
    pub fn new(path: &Path, text: &str, tokens: BTreeMap<String, String>) -> Result<ChatTemplate> {
        let mut templates = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        let syntax = syntax.trim_blocks(true).lstrip_blocks(true).build();
        templates.set_syntax(syntax.map_err(|e| wrong(path, &e))?);
        templates.set_fuel(Some(FUEL));
        templates.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        templates.add_function("raise_exception", raise_exception);
        templates.add_function("strftime_now", strftime_now);
        templates.add_filter("tojson", to_json);
        templates
            .add_template_owned(NAME, without_generation(text))
            .map_err(|e| wrong(path, &e))?;
        Ok(ChatTemplate {
            path: path.to_owned(),
            templates,
            tokens,
        })
    }

    /// A chat as a text. `add_generation_prompt` ends it with the beginning of the assistant's turn.
    ///
    /// # Errors
    /// [`Error::File`] with what the template says of messages that it does not take; [`Error::Refused`]
    /// for none at all.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::refused("messages", 0, "one at least"));
        }
        let messages: Vec<Value> = messages
            .iter()
            .map(|Message { role, content }| context! { role, content })
            .collect();
        let tokens = Value::from(self.tokens.clone());
        let variables = context! {
            messages, add_generation_prompt, tools => (), documents => (), ..tokens
        };
        self.templates
            .get_template(NAME)
            .and_then(|template| template.render(variables))
            .map_err(|e| wrong(&self.path, &e))
    }
}

fn wrong(path: &Path, error: &minijinja::Error) -> Error {
    Error::file(path, format_args!("its chat template: {error:#}"))
}

/// `{% generation %}`, which marks what is trained on, is a block without a meaning here.
fn without_generation(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, tag)) = rest.split_once("{%") {
        let (inner, after) = tag.split_once("%}").unwrap_or((tag, ""));
        let word = inner
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        let inner = match word {
            "generation" => inner.replace("generation", "if true"),
            "endgeneration" => inner.replace("endgeneration", "endif"),
            _ => inner.to_string(),
        };
        out.push_str(before);
        out.push_str("{%");
        out.push_str(&inner);
        if tag.contains("%}") {
            out.push_str("%}");
        }
        rest = after;
    }
    out + rest
}

fn raise_exception(what: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, what))
}

/// The local time, as C's strftime writes it.
fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))
}

/// JSON with the spaces that Python's json.dumps puts, and nothing escaped that need not be.
fn to_json(value: &Value, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let mut out = String::new();
    write_json(value, indent, 0, &mut out)?;
    Ok(Value::from_safe_string(out))
}

fn write_json(
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    out: &mut String,
) -> std::result::Result<(), minijinja::Error> {
    let fail = |what: &str| {
        Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            what.to_string(),
        ))
    };
    if depth > 100 {
        return fail("tojson: more than 100 lists within lists");
    }
    let (open, close) = match value.kind() {
        ValueKind::None => {
            out.push_str("null");
            return Ok(());
        }
        ValueKind::Bool => {
            out.push_str(if value.is_true() { "true" } else { "false" });
            return Ok(());
        }
        ValueKind::Number => {
            out.push_str(&value.to_string());
            return Ok(());
        }
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            out.push_str(&serde_json::Value::from(text).to_string());
            return Ok(());
        }
        ValueKind::Seq | ValueKind::Iterable => ('[', ']'),
        ValueKind::Map => ('{', '}'),
        _ => return fail("tojson: this value has no JSON"),
    };
    out.push(open);
    let line = |out: &mut String, depth: usize| {
        if let Some(n) = indent {
            out.push('\n');
            out.push_str(&" ".repeat(n.min(16) * depth));
        }
    };
    let mut empty = true;
    for item in value.try_iter()? {
        if !empty {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        empty = false;
        line(out, depth + 1);
        if open == '{' {
            let key = serde_json::Value::from(item.to_string());
            out.push_str(&format!("{key}: "));
            write_json(&value.get_item(&item)?, indent, depth + 1, out)?;
        } else {
            write_json(&item, indent, depth + 1, out)?;
        }
    }
    if !empty {
        line(out, depth);
    }
    out.push(close);
    Ok(())
}
