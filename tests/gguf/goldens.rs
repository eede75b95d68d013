//! Files that tests share: small ones beside the goldens, and the real model where it was fetched.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(name)
}

pub fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

/// Where `scripts/fetch-smollm2` puts the model; `None`, said loudly, where it is not.
pub fn smollm2() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let path = cache.join("qkv/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.is_file() {
        return Some(path);
    }
    let (path, fetch) = (path.display(), "scripts/fetch-smollm2 fetches it");
    // Not by eprintln, which a passing test keeps to itself.
    let said = format!("NOT TESTED: {path} is not there; {fetch}\n");
    std::io::stderr().write_all(said.as_bytes()).unwrap();
    None
}
