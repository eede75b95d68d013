//! Weights by name out of a safetensors file, checked, as floats.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata, SafeTensors};

use super::files::Bytes;
use crate::{Error, Result};

/// A safetensors file whose tensors are taken one by one.
pub(super) struct Weights {
    path: PathBuf,
    bytes: Bytes,
    header: usize,
    metadata: Metadata,
    left: BTreeSet<String>,
    taken: u64,
}

impl Weights {
    pub fn new(path: &Path, bytes: Bytes) -> Result<Self> {
        let (header, metadata) = SafeTensors::read_metadata(&bytes)
            .map_err(|e| Error::file(path, format_args!("not a whole safetensors file: {e}")))?;
        let body = bytes.len() - (header + 8);
        if metadata.data_len() != body {
            let need = metadata.data_len();
            return Err(Error::file(
                path,
                format_args!("its header promises {need} bytes of tensors, it has {body}"),
            ));
        }
        Ok(Weights {
            path: path.to_owned(),
            left: metadata.tensors().into_keys().collect(),
            bytes,
            header: header + 8,
            metadata,
            taken: 0,
        })
    }

    /// Bytes of all tensors, and of those taken so far.
    pub fn progress(&self) -> (u64, u64) {
        (self.taken, (self.bytes.len() - self.header) as u64)
    }

    pub fn has(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    /// The tensor `name`, which must have that shape and hold finite floats.
    pub fn take(&mut self, name: &str, shape: &[u32]) -> Result<Vec<f32>> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| self.error(format_args!("it has no tensor {name}")))?;
        let wanted: Vec<usize> = shape.iter().map(|&n| n as usize).collect();
        if info.shape != wanted {
            let is = &info.shape;
            return Err(self.error(format_args!(
                "{name} has the shape {is:?}; config.json asks for {wanted:?}"
            )));
        }
        let (from, to) = info.data_offsets;
        let data = &self.bytes[self.header + from..self.header + to];
        let values: Vec<f32> = match info.dtype {
            Dtype::F32 => data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| f32::from_le_bytes(b))
                .collect(),
            Dtype::F16 => data
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&b| half::f16::from_le_bytes(b).to_f32())
                .collect(),
            Dtype::BF16 => data
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&b| half::bf16::from_le_bytes(b).to_f32())
                .collect(),
            other => {
                return Err(self.error(format_args!(
                    "{name} is {other:?}; f32, f16 and bf16 can be read"
                )));
            }
        };
        if let Some(ix) = values.iter().position(|value| !value.is_finite()) {
            let value = values[ix];
            return Err(self.error(format_args!("{name} is {value} at element {ix}")));
        }
        self.taken += (to - from) as u64;
        self.left.remove(name);
        Ok(values)
    }

    /// The next `take` may leave that tensor where it is.
    pub fn skip(&mut self, name: &str) {
        self.left.remove(name);
    }

    /// An error if a tensor was not asked for: the config does not describe these weights.
    pub fn finish(self) -> Result<()> {
        match self.left.first() {
            None => Ok(()),
            Some(name) => {
                let n = self.left.len();
                Err(self.error(format_args!("{n} tensors have no place in the model that config.json describes, the first is {name}")))
            }
        }
    }

    fn error(&self, what: std::fmt::Arguments) -> Error {
        Error::file(&self.path, what)
    }
}

/// Reads any bytes as `model.safetensors` and takes every tensor, for the fuzz targets.
#[cfg(fuzzing)]
pub fn fuzz_safetensors(bytes: &[u8]) {
    let Ok(mut weights) = Weights::new(Path::new("fuzz"), Bytes::Owned(bytes.to_vec())) else {
        return;
    };
    let tensors = weights.metadata.tensors().into_iter();
    let shapes: Vec<(String, Vec<usize>)> = tensors
        .map(|(name, info)| (name, info.shape.clone()))
        .collect();
    for (name, shape) in shapes {
        let narrow: Option<Vec<u32>> = shape.iter().map(|&n| n.try_into().ok()).collect();
        if let Some(Ok(values)) = narrow.map(|shape| weights.take(&name, &shape)) {
            assert_eq!(values.len(), shape.iter().product::<usize>());
        }
    }
    let _ = weights.finish();
}
