//! Other programs' attention: each in a process of its own, one a shape, so that a hang or a crash ends no more
//! than that. They speak lines of JSON:
//!
//! ```text
//! peer  {"missing": ["torch"]}                             what must be installed first; in general nothing
//! ours  {"input": FILE, "output": FILE, "causal": false, "storage": "f32"}
//! peer  {"first_ms": 3.1, "about": {"version": "1.0"}}     the inputs are on its device, and it made a call
//! ours  "call"                                             as often as we like
//! peer  {}
//! ours  "end"
//! peer  {"clock": "device", "times_ms": [0.7]}             of every call but the first, by that clock or "host"
//! ```
//!
//! The files are safetensors in f32: q [B,H,Q,D], k and v [B,Hk,K,D], as the storage type holds them, and `out`
//! [B,H,Q,D], the last call's answer. In place of any answer a peer may say `{"failed": "why"}`, its last word.
//! peers.py beside this file speaks so for what has a Python package, benches/peers/burn for burn.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use qkv::{Error, Result};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::{Floats, save};
use super::shape::Shape;

/// Compiled in, so that an installed program has it.
const SCRIPT: &str = include_str!("peers.py");

/// In the order of their turns: threads of torch spin for a while after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Name {
    /// ONNX Runtime on WebGPU
    Ort,
    /// burn on wgpu
    Burn,
    /// ggml on Vulkan
    Ggml,
    /// PyTorch on the CPU
    Torch,
}

impl Name {
    pub fn word(self) -> &'static str {
        match self {
            Name::Ort => "ort",
            Name::Burn => "burn",
            Name::Ggml => "ggml",
            Name::Torch => "torch",
        }
    }

    /// Whether it runs on the device whose limits are measured.
    pub fn is_on_device(self) -> bool {
        self != Name::Torch
    }

    /// What `pip install` must have brought.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Name::Ort => &["numpy", "safetensors", "onnx", "onnxruntime-webgpu"],
            // Called by its C interface, which changes.
            Name::Ggml => &[
                "numpy",
                "safetensors",
                "loom-py-rt==1.0.0rc19",
                "loom-py-rt-vulkan==1.0.0rc19",
            ],
            Name::Torch => &["numpy", "safetensors", "torch"],
            Name::Burn => &[],
        }
    }
}

/// The peers that were asked for, and how they are run.
pub struct Peers {
    names: Vec<Name>,
    python: PathBuf,
    burn: PathBuf,
    timeout: Duration,
    folder: TempDir,
}

/// A peer that has a shape's inputs on its device.
pub struct Peer {
    pub name: Name,
    pub first_ms: f64,
    pub about: BTreeMap<String, String>,
    talk: Talk,
    output: PathBuf,
    calls: usize,
    /// Why it has no more turns.
    failed: Option<String>,
}

/// What a peer measured.
pub struct Timed {
    pub times_ms: Vec<f64>,
    pub timestamps: bool,
    /// [B,H,Q,D].
    pub out: Vec<f32>,
}

#[derive(Deserialize)]
struct Hello {
    missing: Vec<String>,
}

#[derive(Deserialize)]
struct Ready {
    first_ms: f64,
    about: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Done {}

#[derive(Deserialize)]
struct Times {
    clock: Clock,
    times_ms: Vec<f64>,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Clock {
    Device,
    Host,
}

impl Peers {
    /// Refuses where one of them cannot be run here, and says what would help.
    pub fn new(names: &[Name], python: &Path, burn: &Path, timeout: Duration) -> Result<Peers> {
        let mut names = names.to_vec();
        names.sort();
        names.dedup();
        let folder =
            TempDir::with_prefix("qkv-bench-").map_err(|e| Error::file(std::env::temp_dir(), e))?;
        let peers = Peers {
            names,
            python: python.to_owned(),
            burn: burn.to_owned(),
            timeout,
            folder,
        };
        let script = peers.script();
        std::fs::write(&script, SCRIPT).map_err(|e| Error::file(&script, e))?;
        let mut missing: Vec<String> = Vec::new();
        for &name in &peers.names {
            let said = peers.talk(name).map(|(_, hello)| hello.missing);
            match said {
                Ok(more) => missing.extend(more),
                Err(why) if name == Name::Burn => {
                    let bound =
                        format!("{why}; `cargo install --path benches/peers/burn` makes it");
                    return Err(Error::refused("--burn", burn.display(), bound));
                }
                Err(why) => {
                    let bound = format!("{why}; {}", peers.help());
                    return Err(Error::refused("--python", python.display(), bound));
                }
            }
        }
        missing.sort();
        missing.dedup();
        match missing.is_empty() {
            true => Ok(peers),
            false => {
                let bound = format!("it lacks {}; {}", missing.join(", "), peers.help());
                Err(Error::refused("--python", python.display(), bound))
            }
        }
    }

    fn script(&self) -> PathBuf {
        self.folder.path().join("peers.py")
    }

    /// What the peers of Python want.
    fn help(&self) -> String {
        let python = self.names.iter().filter(|name| **name != Name::Burn);
        let names: Vec<&str> = python.clone().map(|name| name.word()).collect();
        let mut packages: Vec<&str> = Vec::new();
        for package in python.flat_map(|name| name.packages()) {
            if !packages.contains(package) {
                packages.push(package);
            }
        }
        let (names, packages) = (names.join(","), packages.join(" "));
        format!("--peers={names} wants a Python 3.9 or later with `pip install {packages}`")
    }

    /// Starts its process and hears what it lacks.
    fn talk(&self, name: Name) -> std::result::Result<(Talk, Hello), String> {
        let mut command = match name {
            Name::Burn => Command::new(&self.burn),
            name => {
                let mut command = Command::new(&self.python);
                command.arg(self.script()).arg(name.word());
                command.args(name.packages());
                command
            }
        };
        let complaints = self.folder.path().join(format!("{}.stderr", name.word()));
        let mut talk = Talk::new(&mut command, complaints, self.timeout)?;
        let hello = talk.hear()?;
        Ok((talk, hello))
    }

    /// Each peer with q, k and v on its device, or why it is not.
    pub fn start(
        &self,
        shape: &Shape,
        inputs: Vec<Floats>,
    ) -> Result<Vec<(Name, std::result::Result<Peer, String>)>> {
        let path = self.folder.path().join("in.safetensors");
        save(&path, inputs)?;
        let start = |&name: &Name| (name, self.begin(name, shape, &path));
        Ok(self.names.iter().map(start).collect())
    }

    fn begin(&self, name: Name, shape: &Shape, input: &Path) -> std::result::Result<Peer, String> {
        let output = format!("{}.safetensors", name.word());
        let output = self.folder.path().join(output);
        let _ = std::fs::remove_file(&output); // what is there is of the shape before
        let (mut talk, _) = self.talk(name)?;
        let Ready { first_ms, about } = talk.ask(&json!({
            "input": input,
            "output": output,
            "causal": shape.causal,
            "storage": shape.dtype().name(),
        }))?;
        Ok(Peer {
            name,
            first_ms,
            about,
            talk,
            output,
            calls: 0,
            failed: None,
        })
    }
}

impl Peer {
    /// One call, timed by the peer; none any more after one that failed, which ends its process: it would go on
    /// computing beside the others.
    pub fn call(&mut self) {
        if self.failed.is_some() {
            return;
        }
        match self.talk.ask::<Done>(&json!("call")) {
            Ok(Done {}) => self.calls += 1,
            Err(why) => {
                self.failed = Some(why);
                self.talk.kill();
            }
        }
    }

    /// Its times, one a call, and its answer.
    pub fn end(&mut self, shape: &Shape) -> std::result::Result<Timed, String> {
        if let Some(why) = self.failed.take() {
            return Err(why);
        }
        let Times { clock, times_ms } = self.talk.ask(&json!("end"))?;
        if times_ms.len() != self.calls {
            let n = times_ms.len();
            return Err(format!("it gave {n} times for {} calls", self.calls));
        }
        if let Some(bad) = times_ms.iter().find(|ms| !(ms.is_finite() && **ms > 0.0)) {
            return Err(format!("it gave a time of {bad} ms"));
        }
        Ok(Timed {
            times_ms,
            timestamps: clock == Clock::Device,
            out: answer(&self.output, shape)?,
        })
    }
}

/// `out` of a file, if it has the shape that it must have.
fn answer(path: &Path, shape: &Shape) -> std::result::Result<Vec<f32>, String> {
    let unread = |e: &dyn std::fmt::Display| format!("its answer cannot be read: {e}");
    let bytes = std::fs::read(path).map_err(|e| unread(&e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| unread(&e))?;
    let out = file.tensor("out").map_err(|e| unread(&e))?;
    let want = [shape.batch, shape.heads, shape.q_len, shape.dim].map(|n| n as usize);
    if out.dtype() != Dtype::F32 || out.shape() != want {
        let (dtype, got) = (out.dtype(), out.shape());
        return Err(format!("its answer is {dtype:?} {got:?}, not F32 {want:?}"));
    }
    let fours = out.data().as_chunks::<4>().0.iter();
    let values: Vec<f32> = fours.map(|&b| f32::from_le_bytes(b)).collect();
    match values.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(format!("WRONG: its answer has a value of {x}")),
        None => Ok(values),
    }
}

/// A process and its lines.
struct Talk {
    child: Child,
    asks: ChildStdin,
    answers: Receiver<std::io::Result<String>>,
    complaints: PathBuf,
    timeout: Duration,
}

impl Talk {
    fn new(
        command: &mut Command,
        complaints: PathBuf,
        timeout: Duration,
    ) -> std::result::Result<Talk, String> {
        let stderr = File::create(&complaints).map_err(|e| e.to_string())?;
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .map_err(|e| e.to_string())?;
        let (asks, says) = match (child.stdin.take(), child.stdout.take()) {
            (Some(asks), Some(says)) => (asks, says),
            _ => return Err("it has no standard input and output".into()),
        };
        let (sender, answers) = channel();
        // Ends with the process, whose pipe then closes, or when nobody listens any more.
        std::thread::spawn(move || {
            for line in BufReader::new(says).lines() {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Talk {
            child,
            asks,
            answers,
            complaints,
            timeout,
        })
    }

    fn ask<T: DeserializeOwned>(&mut self, what: &Value) -> std::result::Result<T, String> {
        // Where it has ended, what it answers says more than what could not be written.
        let _ = writeln!(self.asks, "{what}").and_then(|()| self.asks.flush());
        self.hear()
    }

    fn hear<T: DeserializeOwned>(&mut self) -> std::result::Result<T, String> {
        let line = match self.answers.recv_timeout(self.timeout) {
            Ok(Ok(line)) => line,
            Ok(Err(e)) => return Err(format!("it answers no text: {e}")),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = self.timeout.as_secs_f64();
                return Err(format!("no answer in {seconds} s"));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(self.end()),
        };
        let unclear = || {
            format!(
                "it answers {:?}",
                line.chars().take(200).collect::<String>()
            )
        };
        let value: Value = serde_json::from_str(&line).map_err(|_| unclear())?;
        match value.get("failed") {
            Some(Value::String(why)) => {
                let words: Vec<&str> = why.split_whitespace().collect();
                Err(words.join(" ").chars().take(500).collect())
            }
            _ => serde_json::from_value(value).map_err(|_| unclear()),
        }
    }

    /// How it ended, and its last complaint.
    fn end(&mut self) -> String {
        let started = Instant::now();
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status.to_string(),
                Ok(None) if started.elapsed() < self.timeout => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                _ => break "its output closed".into(),
            }
        };
        let said = std::fs::read(&self.complaints).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        match said.lines().map(str::trim).rfind(|line| !line.is_empty()) {
            Some(line) => format!("it ended, {status}: {line}"),
            None => format!("it ended, {status}"),
        }
    }
}

impl Talk {
    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.kill();
    }
}
