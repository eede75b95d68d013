//! The house's order, read from the paths in `src`: arrows point down, `wgpu` is spoken in one folder,
//! what is pure names no device, and families are data.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What each part of `src` may import of ours. A part is a file or folder at the top.
const ARROWS: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    (
        "cli",
        &[
            "complete",
            "translate",
            "generate",
            "text",
            "model",
            "layers",
            "tune",
            "doctor",
            "attention",
            "cache",
            "ops",
            "gguf",
            "gpu",
            "error",
        ],
    ),
    (
        "complete",
        &["generate", "text", "model", "ops", "gguf", "gpu", "error"],
    ),
    ("translate", &["generate", "text", "model", "gpu", "error"]),
    ("generate", &["model", "cache", "ops", "gpu", "error"]),
    (
        "model",
        &[
            "layers",
            "attention",
            "cache",
            "ops",
            "gguf",
            "gpu",
            "error",
        ],
    ),
    ("layers", &["attention", "cache", "ops", "gpu", "error"]),
    ("tune", &["attention", "gpu", "error"]),
    ("doctor", &["attention", "ops", "gpu", "error", "reference"]),
    ("attention", &["gpu", "error"]),
    ("cache", &["gpu", "error"]),
    ("ops", &["gpu", "error"]),
    ("gpu", &["error"]),
    ("text", &["gguf", "error"]),
    ("gguf", &["error"]),
    ("error", &[]),
    ("reference", &[]),
];

/// The only files beside the doctor that import the oracle: what they are for is to compare.
const JUDGES: &[&str] = &[
    "cli/attend/verify.rs",
    "cli/bench/measure.rs",
    "tune/job.rs",
];

/// Words of devices, clocks, files and the environment, which what is pure does not say.
const IMPURE: &[&str] = &[
    "Gpu",
    "Recorder",
    "Recording",
    "wgpu",
    "Instant",
    "SystemTime",
    "time",
    "fs",
    "File",
    "io",
    "env",
    "thread",
    "Mutex",
    "OnceLock",
    "unsafe",
];

/// Words of a forward pass.
const FORWARD: &[&str] = &[
    "Gpu",
    "Recorder",
    "Stream",
    "Tensor",
    "dispatch",
    "record",
    "encode",
    "forward",
    "attention",
    "matmul",
];

/// Names of model families, of which the layers know nothing.
const FAMILIES: &[&str] = &[
    "marian", "bart", "opus", "t5", "whisper", "nllb", "pegasus", "llama", "mistral", "qwen",
    "smollm",
];

/// The text without comments and without what stands between quotes.
fn code(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if rest.starts_with("'\"'") {
            rest = &rest[3..];
        } else if first == '"' {
            let mut escaped = false;
            let end = rest[1..].find(|c| {
                let ends = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                ends
            });
            out.push_str("\"\"");
            rest = &rest[end.map_or(rest.len(), |end| end + 2)..];
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    out
}

/// Words and signs, in order; `::` is one sign.
fn tokens(code: &str) -> Vec<&str> {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let len = if word(first) {
            rest.find(|c| !word(c)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        tokens.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    tokens
}

/// The names right behind a path's `::`: one, or those at the top of a group in braces.
fn heads<'t>(tokens: &[&'t str]) -> Vec<&'t str> {
    if tokens.first() != Some(&"{") {
        return tokens.first().copied().into_iter().collect();
    }
    let (mut depth, mut heads, mut begins) = (0, Vec::new(), true);
    for &token in tokens {
        match token {
            "{" => depth += 1,
            "}" => depth -= 1,
            "," => begins = depth == 1,
            name if begins && depth == 1 => {
                heads.push(name);
                begins = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

/// The parts of the crate that a file imports: what stands behind `crate::`, `qkv::`, or as many
/// `super::` as lead out of its part. `depth` is the file's own: 1 for a part's `mod.rs`.
fn imports(tokens: &[&str], depth: usize) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for at in 0..tokens.len() {
        let inside = at > 0 && tokens[at - 1] == "::";
        let behind = match tokens[at] {
            "crate" | "qkv" if !inside && tokens.get(at + 1) == Some(&"::") => at + 2,
            "super" if !inside => {
                let pairs = tokens[at..].chunks(2);
                let supers = pairs.take_while(|pair| *pair == ["super", "::"]).count();
                if supers < depth {
                    continue;
                }
                at + 2 * supers
            }
            _ => continue,
        };
        for name in heads(&tokens[behind..]) {
            found.insert(match name {
                "Error" | "Result" => "error".to_string(),
                name => name.to_string(),
            });
        }
    }
    found
}

/// What is wrong with one file of `src`; `path` is relative to it.
fn check(path: &str, text: &str) -> Vec<String> {
    let part = path.split(['/', '.']).next().expect("a name");
    let code = code(text);
    let tokens = tokens(&code);
    let mut wrong = Vec::new();
    let mut object = |what: String| wrong.push(format!("src/{path}: {what}"));

    if part == "lib" {
        // The crate's root declares the parts, and re-exports.
        return wrong;
    }
    let known = |name: &str| ARROWS.iter().find(|(part, _)| *part == name);
    let Some((_, may)) = known(part) else {
        object(format!("`{part}` has no place in ARROWS"));
        return wrong;
    };
    let depth = match path.ends_with("/mod.rs") {
        true => path.matches('/').count(),
        false => path.matches('/').count() + 1,
    };
    for name in imports(&tokens, depth) {
        let judges = JUDGES.contains(&path) && name == "reference";
        // Other names are the file's own, seen from a module of tests inside it.
        if known(&name).is_some() && name != part && !may.contains(&name.as_str()) && !judges {
            object(format!("it imports `{name}`"));
        }
    }
    let says = |words: &[&str]| -> Vec<String> {
        let said = tokens.iter().filter(|token| words.contains(token));
        let said: BTreeSet<&&str> = said.collect();
        said.into_iter().map(|word| word.to_string()).collect()
    };
    if part != "gpu" && tokens.windows(2).any(|pair| pair == ["wgpu", "::"]) {
        object("it speaks `wgpu`".into());
    }
    let forbidden = match path {
        path if path.starts_with("attention/problem/") => IMPURE,
        path if path.starts_with("attention/plan/") => IMPURE,
        "model/marian.rs" | "model/llama.rs" => FORWARD,
        _ => &[],
    };
    for word in says(forbidden) {
        object(format!("it says `{word}`"));
    }
    if part == "layers" {
        let text = text.to_lowercase();
        for family in FAMILIES.iter().filter(|name| text.contains(**name)) {
            object(format!("it names the family {family}"));
        }
    }
    wrong
}

/// Every file under a folder that ends in `.rs`.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            all.push(path);
        }
    }
    all.sort();
    all
}

#[test]
fn every_arrow_points_down() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = files(&src);
    let mut parts = BTreeSet::new();
    let mut wrong = Vec::new();
    for file in &files {
        let path = file.strip_prefix(&src).unwrap().to_str().unwrap();
        let path = path.replace('\\', "/");
        parts.extend(path.split(['/', '.']).next().map(str::to_string));
        wrong.extend(check(&path, &std::fs::read_to_string(file).unwrap()));
    }
    println!("{} files in {} parts", files.len(), parts.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (part, _) in ARROWS {
        assert!(parts.contains(*part), "{part} is in ARROWS only");
    }
}

#[test]
fn the_arrows_have_no_circle() {
    // A part imports only parts that stand below it in the list.
    for (ix, (part, may)) in ARROWS.iter().enumerate() {
        for name in *may {
            let below = ARROWS[ix + 1..].iter().any(|(other, _)| other == name);
            assert!(below, "{part} -> {name}");
        }
    }
}

#[test]
fn planted_faults_are_found() {
    for (path, text, word) in [
        ("ops/mod.rs", "use crate::layers::Batch;", "`layers`"),
        (
            "ops/mod.rs",
            "use crate::{Result, cache::{Cache, Extents}};",
            "`cache`",
        ),
        (
            "gpu/mod.rs",
            "fn f() { crate::attention::plan(); }",
            "`attention`",
        ),
        ("gpu/tensor.rs", "use super::super::ops;", "`ops`"),
        ("gpu/mod.rs", "use super::ops;", "`ops`"),
        ("gpu/new/deep.rs", "use super::super::super::ops;", "`ops`"),
        (
            "gpu/new/mod.rs",
            "use super::super::{Error, model};",
            "`model`",
        ),
        ("text.rs", "use super::model::Source;", "`model`"),
        (
            "text/spm.rs",
            "use crate::{\n    gpu::Gpu,\n    Result,\n};",
            "`gpu`",
        ),
        ("error.rs", "use crate::gpu::Gpu;", "`gpu`"),
        ("layers/mod.rs", "use crate::model::Spec;", "`model`"),
        ("layers/mod.rs", "// as in Marian", "marian"),
        ("layers/causal.rs", "// as in Qwen2", "qwen"),
        ("model/mod.rs", "use crate::generate::Step;", "`generate`"),
        ("model/mod.rs", "use crate::reference;", "`reference`"),
        (
            "cli/mod.rs",
            "use qkv::reference::attention;",
            "`reference`",
        ),
        (
            "cli/mod.rs",
            "use qkv::{gpu::Gpu, wgpu::Limits};\nfn f(x: wgpu::Limits) {}",
            "`wgpu`",
        ),
        ("model/mod.rs", "fn f(device: &wgpu::Device) {}", "`wgpu`"),
        (
            "attention/plan/mod.rs",
            "let now = std::time::Instant::now();",
            "`Instant`",
        ),
        ("attention/plan/mod.rs", "std::env::var(name)", "`env`"),
        (
            "cli/attend/mod.rs",
            "use qkv::reference::attention;",
            "`reference`",
        ),
        (
            "cli/attend/verify.rs",
            "use qkv::{reference, wgpu::Limits};\nfn f(x: wgpu::Limits) {}",
            "`wgpu`",
        ),
        (
            "attention/problem/mod.rs",
            "use crate::gpu::{Gpu, Tensor};",
            "`Gpu`",
        ),
        ("attention/problem/view.rs", "std::fs::read(path)", "`fs`"),
        ("model/marian.rs", "use crate::gpu::Recorder;", "`Recorder`"),
        ("model/llama.rs", "fn f(x: &Tensor) {}", "`Tensor`"),
        ("reference/stack.rs", "use crate::ops;", "`ops`"),
        ("gpu/mod.rs", "use crate::doctor::Verdict;", "`doctor`"),
        ("doctor/mod.rs", "use crate::model::Spec;", "`model`"),
        ("other.rs", "", "`other`"),
    ] {
        let said = check(path, text).join("\n");
        assert!(said.contains(word), "{path}: {text:?}: {said:?}");
        assert!(said.contains(&format!("src/{path}: ")), "{said}");
    }
}

#[test]
fn what_is_allowed_is_left_alone() {
    for (path, text) in [
        ("lib.rs", "pub mod gpu;\npub use wgpu;"),
        (
            "gpu/mod.rs",
            "use crate::{Error, Result};\nfn f(device: &wgpu::Device) {}",
        ),
        ("gpu/tensor.rs", "use super::stats::Stats;"),
        (
            "gpu/recorder.rs",
            "mod tests { use super::super::Gpu; use super::fold; }",
        ),
        ("text/mod.rs", "use super::Error;"),
        (
            "ops/mod.rs",
            "// crate::layers, wgpu::Device\nlet s = \"crate::model \\\" wgpu::\";",
        ),
        (
            "ops/mod.rs",
            "let c = '\"'; use crate::gpu::Gpu; let d = '\"';",
        ),
        (
            "model/mod.rs",
            "Gpu::from_wgpu(a); use crate::layers::{self, model};",
        ),
        (
            "cli/mod.rs",
            "use qkv::translate::Translator; use super::model;",
        ),
        (
            "cli/attend/verify.rs",
            "use qkv::reference::{self, Offset};",
        ),
    ] {
        assert_eq!(check(path, text), Vec::<String>::new(), "{path}: {text:?}");
    }
}
