//! Chat templates as transformers renders them.

use std::path::Path;

use qkv::gguf::{Gguf, Header};
use qkv::text::{ChatTemplate, Message};

use crate::goldens::{golden, json, smollm2};
use crate::writer::{File, text, value};

fn messages(case: &serde_json::Value) -> Vec<Message> {
    let turns = case["messages"].as_array().unwrap().iter();
    let word = |turn: &serde_json::Value, key: &str| turn[key].as_str().unwrap().to_string();
    let turn = |turn| Message {
        role: word(turn, "role"),
        content: word(turn, "content"),
    };
    turns.map(turn).collect()
}

fn one(role: &str, content: &str) -> Message {
    Message {
        role: role.into(),
        content: content.into(),
    }
}

fn named(name: &str) -> ChatTemplate {
    let read = |file: &str| {
        let tokens = br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;
        Ok(match file {
            "chat_template.jinja" => {
                Some(std::fs::read(golden(&format!("chat/{name}.jinja"))).unwrap())
            }
            "tokenizer_config.json" => Some(tokens.to_vec()),
            _ => None,
        })
    };
    ChatTemplate::load(Path::new(name), &read).unwrap().unwrap()
}

#[test]
fn chats_are_rendered_as_transformers_renders_them() {
    let (mut texts, mut errors) = (0, 0);
    for case in json("chat/chats.json").as_array().unwrap() {
        let template = match case["template"].as_str().unwrap() {
            "smollm2" => {
                let Some(path) = smollm2() else {
                    continue;
                };
                let gguf = Gguf::open(&path).unwrap();
                ChatTemplate::from_gguf(gguf.header()).unwrap().unwrap()
            }
            name => named(name),
        };
        let got = template.render(&messages(case), case["prompt"].as_bool().unwrap());
        match (got, case["error"].as_str()) {
            (Ok(got), None) => {
                assert_eq!(got, case["text"].as_str().unwrap(), "{case}");
                texts += 1;
            }
            (Err(said), Some(error)) => {
                // transformers refuses empty chats in words of its own.
                let word = if error.contains("empty conversation") {
                    "messages is 0"
                } else {
                    error
                };
                assert!(said.to_string().contains(word), "{said}: {case}");
                errors += 1;
            }
            (got, error) => panic!("{got:?}, {error:?}: {case}"),
        }
    }
    println!("{texts} texts, {errors} errors");
    assert!(texts >= 52 && errors >= 12);
}

#[test]
fn templates_come_from_the_file_or_the_directory() {
    let hi = [one("user", "hi")];
    let header = |file: &File| Header::parse(Path::new("m.gguf"), &file.bytes()).unwrap();
    let template = "{{ messages[0].content }} {{ eos_token }}";
    let key = "tokenizer.chat_template";
    let file = File::new()
        .with(key, value(8, &text(template)))
        .with(
            "tokenizer.ggml.tokens",
            crate::writer::array(8, &[text("a"), text("<e>")]),
        )
        .with("tokenizer.ggml.eos_token_id", value(4, &1u32.to_le_bytes()));
    let made = ChatTemplate::from_gguf(&header(&file)).unwrap().unwrap();
    assert_eq!(made.render(&hi, false).unwrap(), "hi <e>");
    assert!(
        ChatTemplate::from_gguf(&header(&File::new()))
            .unwrap()
            .is_none()
    );
    let broken = File::new().with(key, value(8, &text("{% for %}")));
    let said = ChatTemplate::from_gguf(&header(&broken))
        .err()
        .unwrap()
        .to_string();
    assert!(said.starts_with("m.gguf: its chat template: "), "{said}");

    let load = |config: &str| {
        let config = config.as_bytes().to_vec();
        let read = |file: &str| Ok((file == "tokenizer_config.json").then(|| config.clone()));
        ChatTemplate::load(Path::new("dir"), &read)
    };
    assert!(load("{}").unwrap().is_none());
    for config in [
        r#"{"chat_template": "{{ messages[0].content }}!"}"#,
        r#"{"chat_template": [{"name": "x", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}!"}]}"#,
    ] {
        assert_eq!(
            load(config).unwrap().unwrap().render(&hi, false).unwrap(),
            "hi!"
        );
    }
    assert!(load(r#"{"chat_template": 3}"#).is_err());
    assert!(load("{").is_err());
}

#[test]
fn templates_that_never_end_or_nest_without_end_are_errors() {
    for text in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no such role') }}",
        "{{ strftime_now('%!') }}",
        "{{ messages.nothing.at_all }}",
    ] {
        let template = ChatTemplate::new(Path::new("t"), text, Default::default()).unwrap();
        let said = template.render(&[one("user", "hi")], true).unwrap_err();
        assert!(
            said.to_string().starts_with("t: its chat template: "),
            "{said}"
        );
    }
    let template = ChatTemplate::new(
        Path::new("t"),
        "{{ strftime_now('%Y') }}",
        Default::default(),
    )
    .unwrap();
    let year = template.render(&[one("user", "hi")], true).unwrap();
    assert!(year.len() == 4 && year.starts_with("20"), "{year}");
}
