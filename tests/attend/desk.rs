//! A folder with an IN and an OUT, and the program run in it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// A folder with an IN to be written and an OUT to be read.
pub struct Desk {
    dir: tempfile::TempDir,
    pub tensors: Vec<(&'static str, Dtype, Vec<usize>, Vec<u8>)>,
}

/// The tensors of OUT by name: shape and values.
pub type Results = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Numbers in -1 .. 1, the same in every run.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(next).collect()
}

impl Desk {
    pub fn new() -> Self {
        Desk {
            dir: tempfile::tempdir().unwrap(),
            tensors: Vec::new(),
        }
    }

    /// q `[B, H, Q, D]`, k and v `[B, Hk, K, D]`.
    pub fn dense() -> Self {
        let desk = Desk::new().noise("q", &[2, 4, 9, 8]);
        desk.noise("k", &[2, 2, 13, 8]).noise("v", &[2, 2, 13, 6])
    }

    /// Two sequences, of which the first has four queries and five keys; one row and two keys are nobody's.
    pub fn ragged() -> Self {
        let desk = Desk::new().noise("q", &[4, 10, 8]);
        let desk = desk.noise("k", &[2, 14, 8]).noise("v", &[2, 14, 6]);
        desk.integers("cu_q", &[0, 4, 9])
            .integers("cu_k", &[0, 5, 12])
    }

    /// One tensor more, or in the place of the one of that name.
    pub fn with(
        mut self,
        name: &'static str,
        dtype: Dtype,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Self {
        self.tensors.retain(|(other, ..)| *other != name);
        self.tensors.push((name, dtype, shape.to_vec(), bytes));
        self
    }

    pub fn floats(self, name: &'static str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.with(name, Dtype::F32, shape, bytes)
    }

    pub fn noise(self, name: &'static str, shape: &[usize]) -> Self {
        let seed = name
            .bytes()
            .fold(7, |seed, byte| seed * 31 + u64::from(byte));
        self.floats(name, shape, &noise(seed, shape.iter().product()))
    }

    pub fn integers(self, name: &'static str, values: &[i64]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.with(name, Dtype::I64, &[values.len()], bytes)
    }

    pub fn without(mut self, name: &str) -> Self {
        self.tensors.retain(|(other, ..)| *other != name);
        self
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn wgsl(self, text: &str) -> Self {
        std::fs::write(self.path("mod.wgsl"), text).unwrap();
        self
    }

    /// Writes IN and runs `qkv attend IN -o OUT`, in the folder.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let views = self.tensors.iter().map(|(name, dtype, shape, bytes)| {
            (
                *name,
                TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
            )
        });
        safetensors::serialize_to_file(views, None, &self.path("in.safetensors")).unwrap();
        let _ = std::fs::remove_file(self.path("out.safetensors"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_qkv"));
        let command = command.current_dir(self.dir.path());
        let attend = ["attend", "in.safetensors", "-o", "out.safetensors"];
        command.args(attend).args(arguments).output().unwrap()
    }

    /// What a good run printed, and the tensors of OUT.
    #[track_caller]
    pub fn good(&self, arguments: &[&str]) -> (String, Results) {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {said}");
        let bytes = std::fs::read(self.path("out.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::F32);
            let values = view.data().as_chunks::<4>().0.iter();
            let values = values.map(|&bytes| f32::from_le_bytes(bytes)).collect();
            (name, (view.shape().to_vec(), values))
        });
        (String::from_utf8(output.stdout).unwrap(), tensors.collect())
    }

    /// The values of `out` alone.
    #[track_caller]
    pub fn out(&self, arguments: &[&str]) -> Vec<f32> {
        let (_, mut tensors) = self.good(arguments);
        let (_, values) = tensors.remove("out").unwrap();
        assert!(tensors.is_empty());
        values
    }

    /// A run that the oracle must agree with, on so many rows of each result.
    #[track_caller]
    pub fn verified(&self, arguments: &[&str], rows: usize) {
        let (said, tensors) = self.good(&[&["--verify", "--lse"], arguments].concat());
        assert_eq!(said.lines().count(), tensors.len(), "{said}");
        for name in ["out", "lse"] {
            let says = format!("{name}: {rows} rows equal the oracle's");
            assert!(said.contains(&says), "{arguments:?}: {said}");
        }
    }

    /// A run that must be refused, in one line that has all of `words`, and leave nothing behind.
    #[track_caller]
    pub fn refused(&self, arguments: &[&str], words: &[&str]) {
        let output = self.run(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            output.stdout.is_empty() && !said.contains("panicked"),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
        for word in words {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(["in.safetensors", "mod.wgsl"].contains(&&*name), "{name}");
        }
    }
}
