//! Weights by name out of safetensors files, checked, as floats.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, SafeTensors, TensorInfo};

use super::files::{Bytes, Source};
use crate::{Error, Result};

const ONE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A model's safetensors files, whose tensors are taken one by one.
pub(super) struct Weights {
    /// Their folder, or the only one of them.
    path: PathBuf,
    files: Vec<File>,
    /// The file of each tensor that has not been taken.
    left: BTreeMap<String, usize>,
    taken: u64,
}

struct File {
    path: PathBuf,
    bytes: Bytes,
    /// Where the tensors begin.
    body: usize,
    tensors: BTreeMap<String, TensorInfo>,
}

impl File {
    fn new(path: &Path, bytes: Bytes) -> Result<Self> {
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
        let tensors = metadata.tensors().into_iter();
        Ok(File {
            path: path.to_owned(),
            body: header + 8,
            tensors: tensors.map(|(name, info)| (name, info.clone())).collect(),
            bytes,
        })
    }
}

impl Weights {
    /// `model.safetensors` of the source, or the files that `model.safetensors.index.json` names.
    pub fn load(source: &Source) -> Result<Self> {
        let names = match source.file(INDEX)? {
            Some(_) if source.file(ONE)?.is_none() => shards(source)?,
            _ => vec![ONE.to_string()],
        };
        let mut files = Vec::new();
        let mut left = BTreeMap::new();
        for name in &names {
            let path = source.path().join(name);
            let file = File::new(&path, source.must(name)?)?;
            for tensor in file.tensors.keys() {
                if left.insert(tensor.clone(), files.len()).is_some() {
                    let what = format_args!("{tensor} lies in another of the model's files too");
                    return Err(Error::file(path, what));
                }
            }
            files.push(file);
        }
        Ok(Weights {
            path: match names.as_slice() {
                [one] => source.path().join(one),
                _ => source.path().to_owned(),
            },
            files,
            left,
            taken: 0,
        })
    }

    /// Bytes of all tensors, and of those taken so far.
    pub fn progress(&self) -> (u64, u64) {
        let bytes = |file: &File| (file.bytes.len() - file.body) as u64;
        (self.taken, self.files.iter().map(bytes).sum())
    }

    pub fn has(&self, name: &str) -> bool {
        self.files
            .iter()
            .any(|file| file.tensors.contains_key(name))
    }

    /// The tensor `name`, which must have that shape and hold finite floats.
    pub fn take(&mut self, name: &str, shape: &[u32]) -> Result<Vec<f32>> {
        let found = |file: &&File| file.tensors.contains_key(name);
        let Some(file) = self.files.iter().find(found) else {
            return Err(self.error(format_args!("there is no tensor {name}")));
        };
        let info = &file.tensors[name];
        let error = |what: std::fmt::Arguments| Error::file(&file.path, what);
        let wanted: Vec<usize> = shape.iter().map(|&n| n as usize).collect();
        if info.shape != wanted {
            let is = &info.shape;
            return Err(error(format_args!(
                "{name} has the shape {is:?}; config.json asks for {wanted:?}"
            )));
        }
        let (from, to) = info.data_offsets;
        let data = &file.bytes[file.body + from..file.body + to];
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
                return Err(error(format_args!(
                    "{name} is {other:?}; f32, f16 and bf16 can be read"
                )));
            }
        };
        if let Some(ix) = values.iter().position(|value| !value.is_finite()) {
            let value = values[ix];
            return Err(error(format_args!("{name} is {value} at element {ix}")));
        }
        self.taken += (to - from) as u64;
        self.left.remove(name);
        Ok(values)
    }

    /// That tensor may be left where it is.
    pub fn skip(&mut self, name: &str) {
        self.left.remove(name);
    }

    /// An error if a tensor was not asked for: the config does not describe these weights.
    pub fn finish(self) -> Result<()> {
        match self.left.first_key_value() {
            None => Ok(()),
            Some((name, _)) => {
                let n = self.left.len();
                Err(self.error(format_args!("{n} tensors have no place in the model that config.json describes, the first is {name}")))
            }
        }
    }

    fn error(&self, what: std::fmt::Arguments) -> Error {
        Error::file(&self.path, what)
    }
}

/// The files that an index spreads a model's tensors over.
fn shards(source: &Source) -> Result<Vec<String>> {
    let path = source.path().join(INDEX);
    let index = source.json(INDEX)?;
    let map = index.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| Error::file(&path, "it has no weight_map"))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        // A file of the model's own folder: an index leads nowhere else.
        let file = file
            .as_str()
            .filter(|name| name.ends_with(".safetensors") && !name.contains(['/', '\\', ':']));
        let Some(file) = file else {
            let what = format_args!("{tensor} is in no .safetensors file of this folder");
            return Err(Error::file(path, what));
        };
        names.push(file.to_string());
    }
    names.sort();
    names.dedup();
    match names.is_empty() {
        true => Err(Error::file(path, "its weight_map is empty")),
        false => Ok(names),
    }
}

/// Reads any bytes as `model.safetensors` and takes every tensor, for the fuzz targets.
#[cfg(fuzzing)]
pub fn fuzz_safetensors(bytes: &[u8]) {
    let path = Path::new("fuzz");
    let Ok(file) = File::new(path, Bytes::Owned(bytes.to_vec())) else {
        return;
    };
    let tensors = file.tensors.iter();
    let shapes: Vec<(String, Vec<usize>)> = tensors
        .map(|(name, info)| (name.clone(), info.shape.clone()))
        .collect();
    let mut weights = Weights {
        path: path.to_owned(),
        left: file.tensors.keys().map(|name| (name.clone(), 0)).collect(),
        files: vec![file],
        taken: 0,
    };
    for (name, shape) in shapes {
        let narrow: Option<Vec<u32>> = shape.iter().map(|&n| n.try_into().ok()).collect();
        if let Some(Ok(values)) = narrow.map(|shape| weights.take(&name, &shape)) {
            assert_eq!(values.len(), shape.iter().product::<usize>());
        }
    }
    let _ = weights.finish();
}
