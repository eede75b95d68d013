//! Where a model's files come from: a directory, or the program itself.

use std::ops::Deref;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// The bytes of a file: mapped, or compiled in.
pub(crate) enum Bytes {
    Mapped(memmap2::Mmap),
    #[cfg_attr(
        not(feature = "embedded-model"),
        expect(dead_code, reason = "only a compiled-in model is static")
    )]
    Static(&'static [u8]),
    #[cfg(fuzzing)]
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
            #[cfg(fuzzing)]
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// Where a model lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// On disk, as Hugging Face publishes it.
    Directory(PathBuf),
    /// One file, as llama.cpp reads it: a decoder-only model with its tokenizer.
    Gguf(PathBuf),
    /// Compiled into the program by the feature `embedded-model`: English to French and Chinese.
    #[cfg(feature = "embedded-model")]
    Embedded,
}

#[cfg(feature = "embedded-model")]
macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../models/tatoeba-en-fra-zho/", $name)) as &[u8])),*]
    };
}

#[cfg(feature = "embedded-model")]
const EMBEDDED: &[(&str, &[u8])] = embedded![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "source.spm",
    "vocab.json",
];

impl Source {
    /// The model at a path: a GGUF file where that is a file, else a directory.
    pub fn at(path: PathBuf) -> Source {
        match path.is_file() {
            true => Source::Gguf(path),
            false => Source::Directory(path),
        }
    }

    /// The path of the directory or file, also for messages about a file in it.
    pub fn path(&self) -> &Path {
        match self {
            Source::Directory(path) | Source::Gguf(path) => path,
            #[cfg(feature = "embedded-model")]
            Source::Embedded => Path::new("the embedded model"),
        }
    }

    /// A file of the directory; `None` where it has none of that name.
    pub(crate) fn file(&self, name: &str) -> Result<Option<Bytes>> {
        match self {
            Source::Directory(path) => {
                let path = path.join(name);
                let file = match std::fs::File::open(&path) {
                    Ok(file) => file,
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                    Err(e) => return Err(Error::file(path, e)),
                };
                // SAFETY: the map is private to this process and only read while the model is loaded.
                // Another process that truncates the file meanwhile would stop this one; that is the
                // same for every program that maps its input.
                let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::file(path, e))?;
                Ok(Some(Bytes::Mapped(map)))
            }
            Source::Gguf(path) => {
                let what = format_args!("this is one file; a directory with {name} is wanted");
                Err(Error::file(path, what))
            }
            #[cfg(feature = "embedded-model")]
            Source::Embedded => Ok(EMBEDDED
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, bytes)| Bytes::Static(bytes))),
        }
    }

    /// A file that must be there.
    pub(crate) fn must(&self, name: &str) -> Result<Bytes> {
        if let Source::Directory(path) = self
            && !path.is_dir()
        {
            return Err(Error::file(path, "there is no such model directory"));
        }
        self.file(name)?.ok_or_else(|| {
            Error::file(
                self.path().join(name),
                "the model's directory lacks this file",
            )
        })
    }

    /// A JSON file of the directory.
    pub(crate) fn json(&self, name: &str) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.must(name)?)
            .map_err(|e| Error::file(self.path().join(name), e))
    }
}
