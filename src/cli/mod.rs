//! The program: arguments, progress bars and pictures; no logic of its own.

mod attend;
mod bench;
mod compare;
mod devices;
mod doctor;
mod explain;
mod forward;
mod generate;
mod picture;
mod translate;
mod tune;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use qkv::gpu::{DType, Gpu};
use qkv::model::Source;
use qkv::{Error, Result};
use safetensors::tensor::{Dtype as FileDtype, TensorView};

#[derive(Parser)]
#[command(version, about = "Attention on any GPU", max_term_width = 100)]
struct Cli {
    /// The device, by number or a part of its name, as `qkv devices` lists them; the environment's
    /// QKV_DEVICE if not given
    #[arg(long, global = true)]
    device: Option<String>,
    /// Choose kernels by the table of capabilities alone, whatever `qkv tune` has found
    #[arg(long, global = true)]
    no_tune: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Translate text; lines of standard input where none is given
    Translate(translate::Options),
    /// Run the attention operator, with all of its options, on the tensors of a file
    Attend(Box<attend::Options>),
    /// Run a model on token ids, for comparison with other implementations
    Forward(forward::Options),
    /// Go on with a text by a decoder-only model, or answer it
    Generate(generate::Options),
    /// List the devices, what they can do, and which one would be taken
    Devices(devices::Options),
    /// Measure which kernels are best on this device for attention of some shapes, and save it
    Tune(tune::Options),
    /// Verify attention, then time it, beside the device's own measured limits
    Bench(bench::Options),
    /// What got faster or slower between two runs of `qkv bench --json`
    Compare(compare::Options),
    /// Run the device's kernels on small hard problems beside an oracle; exit code 1 where one is wrong
    Doctor(doctor::Options),
}

/// Which device, and whether what was measured on it counts.
struct Device<'a> {
    wanted: Option<&'a str>,
    no_tune: bool,
}

impl Device<'_> {
    fn open(&self) -> Result<Gpu> {
        let gpu = Gpu::choose(self.wanted)?;
        Ok(if self.no_tune { gpu.untuned() } else { gpu })
    }

    /// Refuses what a command does not heed that chooses no kernels.
    fn without_plans(&self, command: &str) -> Result<()> {
        let bound = format!("not with `qkv {command}`, which chooses no kernels");
        match self.no_tune {
            true => Err(Error::refused("--no-tune", "given", bound)),
            false => Ok(()),
        }
    }

    /// Refuses what a command does not heed that opens no device.
    fn not_named(&self, command: &str) -> Result<()> {
        let bound = format!("not with `qkv {command}`, which opens no device");
        match self.wanted {
            Some(device) => Err(Error::refused("--device", device, bound)),
            None => Ok(()),
        }
    }
}

#[derive(Args)]
struct ModelOptions {
    /// A Hugging Face directory, or a GGUF file of a decoder-only model; the embedded model if not given
    #[arg(long, value_name = "DIR|FILE")]
    model: Option<PathBuf>,
    /// How weights and activations are stored
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F32,
    F16,
}

impl ModelOptions {
    fn dtype(&self) -> DType {
        match self.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
        }
    }

    fn source(&self) -> Result<Source> {
        match &self.model {
            Some(path) => Ok(Source::at(path.clone())),
            #[cfg(feature = "embedded-model")]
            None => Ok(Source::Embedded),
            #[cfg(not(feature = "embedded-model"))]
            None => Err(Error::refused(
                "--model",
                "absent",
                "a directory: this build has no embedded model",
            )),
        }
    }
}

/// Runs the program. Errors go to standard error, with exit code 2.
pub fn run() -> ExitCode {
    quiet_loader();
    let logging = tracing_subscriber::EnvFilter::builder()
        .with_env_var("QKV_LOG")
        .with_default_directive("qkv=warn".parse().expect("a directive of ours"))
        .from_env_lossy();
    tracing_subscriber::fmt()
        .with_env_filter(logging)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .with_writer(std::io::stderr)
        .init();
    let cli = Cli::parse();
    let device = &Device {
        wanted: cli.device.as_deref().filter(|device| !device.is_empty()),
        no_tune: cli.no_tune,
    };
    let succeed = |()| ExitCode::SUCCESS;
    let done = match &cli.command {
        Command::Attend(options) => attend::run(options, device),
        Command::Translate(options) => translate::run(options, device).map(succeed),
        Command::Forward(options) => forward::run(options, device).map(succeed),
        Command::Generate(options) => generate::run(options, device).map(succeed),
        Command::Devices(options) => device
            .without_plans("devices")
            .and_then(|()| devices::run(options, device.wanted))
            .map(succeed),
        Command::Tune(options) => tune::run(options, device).map(succeed),
        Command::Bench(options) => bench::run(options, device),
        Command::Compare(options) => device
            .without_plans("compare")
            .and_then(|()| device.not_named("compare"))
            .and_then(|()| compare::run(options))
            .map(succeed),
        Command::Doctor(options) => device
            .without_plans("doctor")
            .and_then(|()| doctor::run(options, device.wanted)),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qkv: {error}");
            ExitCode::from(2)
        }
    }
}

/// Keeps a Mesa layer from complaining, at every start in a container, that there is no desktop to ask
/// which device it prefers. Ours is chosen by us.
fn quiet_loader() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: the program's first act, while it has one thread.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}

/// A bar on standard error, where that is a terminal.
fn progress(n: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(n), ProgressDrawTarget::stderr());
    bar.set_style(ProgressStyle::with_template(template).expect("a template of ours"));
    bar
}

/// Loads with a progress bar.
fn load<T>(gpu: &Gpu, load: impl FnOnce(&Gpu, &mut dyn FnMut(u64, u64)) -> Result<T>) -> Result<T> {
    let bar = progress(0, "loading {bar:30} {bytes} / {total_bytes}");
    let loaded = load(gpu, &mut |done, all| {
        if bar.length() != Some(all) {
            bar.set_length(all);
        }
        bar.set_position(done);
    });
    bar.finish_and_clear();
    loaded
}

/// Writes to standard output. A reader that has gone changes nothing: files and the exit code are still to come.
fn say(text: std::fmt::Arguments) -> Result<()> {
    write_out(text).map(drop)
}

/// The same of a text that goes on for as long as it is read: without a reader the program ends in peace.
fn say_or_end(text: std::fmt::Arguments) -> Result<()> {
    match write_out(text)? {
        true => Ok(()),
        false => std::process::exit(0),
    }
}

/// Whether there was a reader.
fn write_out(text: std::fmt::Arguments) -> Result<bool> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::file("standard output", e)),
    }
}

/// A tensor to be written.
struct Floats {
    name: String,
    shape: Vec<u32>,
    values: Vec<f32>,
}

/// Writes tensors as f32 into a safetensors file.
fn save(path: &Path, tensors: Vec<Floats>) -> Result<()> {
    let tensors = tensors.into_iter().map(|tensor| {
        let shape = tensor.shape.iter().map(|&n| n as usize).collect();
        let values = tensor.values.iter();
        let bytes: Vec<u8> = values.flat_map(|value| value.to_le_bytes()).collect();
        (tensor.name, shape, bytes)
    });
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = tensors.collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(FileDtype::F32, shape.clone(), bytes);
        (name, view.expect("as many bytes as the shape takes"))
    });
    write_whole(path, |part| {
        safetensors::serialize_to_file(views, None, part).map_err(|e| Error::file(path, e))
    })
}

/// Writes a file by way of another one, so that nothing half-written is ever there.
fn write_whole(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let written =
        write(&part).and_then(|()| std::fs::rename(&part, path).map_err(|e| Error::file(path, e)));
    if written.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    written
}
