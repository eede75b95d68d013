//! GGUF version 3 files, as llama.cpp writes them: metadata, and tensors in blocks, read through a memory
//! map. (ggml's specification, docs/gguf.md)

mod blocks;
mod header;

use std::ops::Range;
use std::path::Path;

pub use blocks::Blocks;
pub(crate) use blocks::q5_0_as_q8_0;
pub use header::{Header, Info, List, Value};

use crate::{Error, Result};

/// A file whose header is read and checked; tensors are read when they are asked for.
pub struct Gguf {
    map: memmap2::Mmap,
    header: Header,
}

impl Gguf {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`Error::File`] for what is missing, no GGUF of version 3, or damaged.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = std::fs::File::open(path).map_err(|e| Error::file(path, e))?;
        if file.metadata().is_ok_and(|meta| meta.is_dir()) {
            return Err(Error::file(path, "this is a directory, not a GGUF file"));
        }
        // SAFETY: the map is private to this process and only read while the model is loaded. Another
        // process that truncates the file meanwhile would stop this one; that is the same for every
        // program that maps its input.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::file(path, e))?;
        Ok(Gguf {
            header: Header::parse(path, &map)?,
            map,
        })
    }

    /// The file, for messages about it.
    pub fn path(&self) -> &Path {
        self.header.path()
    }

    /// What stands before the tensors.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// A tensor's type, shape and bytes.
    ///
    /// # Errors
    /// [`Error::File`] where there is none of that name.
    pub fn tensor(&self, name: &str) -> Result<(&Info, &[u8])> {
        let info = self.header.tensors.get(name);
        let info = info.ok_or_else(|| self.error(format_args!("it has no tensor {name}")))?;
        let Range { start, end } = info.range;
        Ok((info, &self.map[start..end]))
    }

    /// A tensor of that shape as floats, all of them finite.
    ///
    /// # Errors
    /// [`Error::File`] where it is missing, of another shape, or not finite.
    pub fn floats(&self, name: &str, shape: &[u32]) -> Result<Vec<f32>> {
        let (info, bytes) = self.tensor(name)?;
        if info.shape != shape {
            let is = &info.shape;
            return Err(self.error(format_args!(
                "{name} has the shape {is:?}; the metadata ask for {shape:?}"
            )));
        }
        let values = info.blocks.expand(bytes);
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(ix) => Err(self.error(format_args!("{name} is {} at element {ix}", values[ix]))),
        }
    }

    /// Something wrong with this file.
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        self.header.error(what)
    }
}
