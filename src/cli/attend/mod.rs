//! `qkv attend`: the operator with all of its options on the tensors of a safetensors file.

mod device;
mod input;
mod options;
mod verify;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use qkv::attention::{self, Plan, Problem, Route, Tensors};
use qkv::gpu::{DType, Gpu, Recorder, Recording, Tensor};
use qkv::{Error, Result};

use super::{Device, Floats, save, say};
use device::OnDevice;
use input::Input;
pub use options::Options;

/// One attention on the device, to be recorded as often as one likes.
struct Job<'a> {
    gpu: &'a Gpu,
    tensors: Tensors<'a>,
    operator: attention::Options,
    plan: Plan,
    scratch: Tensor,
}

/// What came back from the device.
struct Answer {
    out: Vec<f32>,
    lse: Option<Vec<f32>>,
    weights: Option<Vec<f32>>,
}

/// Exit code 1 where `--verify` finds a wrong row.
pub fn run(options: &Options, device: &Device) -> Result<ExitCode> {
    if options.verify && options.has_functions() {
        let bound = "not with --score-mod or --mask-mod: the oracle runs no WGSL";
        return Err(Error::refused("--verify", "given", bound));
    }
    let input = Input::load(&options.input, options.layout, options.has_functions())?;
    let operator = options.operator(input.t5.is_some())?;
    let gpu = options.narrowed(device.open()?);
    let on_device = OnDevice::new(&gpu, &input, options)?;
    let tensors = on_device.tensors(&input)?;
    let problem = Problem::new(&tensors, &operator)?;
    let plan = attention::planned_on(&gpu, &problem)?;
    if options.explain {
        say(format_args!("{}", explain(&gpu, &problem, &plan)))?;
    }
    if options.output.is_none() && !options.verify && options.time.is_none() {
        return Ok(ExitCode::SUCCESS);
    }

    let words = u32::try_from(plan.scratch.max(1)).unwrap_or(u32::MAX);
    let job = Job {
        gpu: &gpu,
        scratch: gpu.empty("scratch", DType::U32, &[words])?,
        tensors,
        operator,
        plan,
    };
    let started = Instant::now();
    let recording = job.record()?;
    gpu.run(&recording)?;
    let first = started.elapsed();
    if let Some(n) = options.time {
        say(format_args!("{}\n", job.time(first, &recording, n)?))?;
    }
    gpu.save_pipelines();

    let read = |tensor: &Option<Tensor>| tensor.as_ref().map(|t| gpu.read_floats(t)).transpose();
    let answer = Answer {
        out: gpu.read_floats(&on_device.out)?,
        lse: read(&on_device.lse)?,
        weights: read(&on_device.weights)?,
    };
    let verdict = match options.verify {
        true => {
            let keys_and_values = on_device.keys_and_values(&gpu, &input)?;
            let kv = keys_and_values.each_ref().map(Vec::as_slice);
            Some(verify::verify(&input, kv, options, &job.operator, &answer))
        }
        false => None,
    };
    if let Some(path) = &options.output {
        save(path, answer.named(&input))?;
    }
    match verdict {
        None => Ok(ExitCode::SUCCESS),
        Some(Ok(text)) => {
            say(format_args!("{text}"))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Err(text)) => {
            eprintln!("qkv: {text}");
            Ok(ExitCode::from(1))
        }
    }
}

impl Answer {
    /// The tensors of OUT.
    fn named(self, input: &Input) -> Vec<Floats> {
        let shapes = input.shapes();
        let tensors = [
            ("out", shapes.out.to_vec(), Some(self.out)),
            ("lse", shapes.lse.to_vec(), self.lse),
            ("weights", shapes.weights.to_vec(), self.weights),
        ];
        // The file has no batch axis where sequences are ragged.
        let axes = usize::from(input.cu_q.is_some());
        let named = tensors.into_iter().filter_map(|(name, shape, values)| {
            Some(Floats {
                name: name.to_string(),
                shape: shape[axes..].to_vec(),
                values: values?,
            })
        });
        named.collect()
    }
}

impl Job<'_> {
    fn record(&self) -> Result<Recording> {
        let mut recorder = Recorder::new(self.gpu);
        attention::record_in(&mut recorder, &self.tensors, &self.operator, &self.scratch)?;
        recorder.finish()
    }

    /// `n` more runs, measured on the device; and as many on the host, where recording, encoding and
    /// submitting are measured.
    fn time(&self, first: Duration, recording: &Recording, n: u32) -> Result<serde_json::Value> {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let mut times = Vec::new();
        for _ in 0..n {
            times.push(ms(self.gpu.time(recording)?));
        }
        let idle = Recorder::new(self.gpu).finish()?;
        let mut host = Vec::new();
        for _ in 0..n {
            let started = Instant::now();
            let recording = self.record()?;
            let mut encoder = self
                .gpu
                .device()
                .create_command_encoder(&Default::default());
            recording.encode(&mut encoder);
            self.gpu.queue().submit([encoder.finish()]);
            host.push(ms(started.elapsed()));
            self.gpu.run(&idle)?;
        }
        host.sort_by(f64::total_cmp);
        let clock = match self.gpu.caps().timestamps {
            true => "device",
            false => "host",
        };
        Ok(serde_json::json!({
            "device": self.gpu.caps().name,
            "route": route_name(self.plan.route),
            "clock": clock,
            "first_ms": ms(first),
            "times_ms": times,
            "host_ms": host[host.len() / 2],
        }))
    }
}

pub fn route_name(route: Route) -> &'static str {
    match route {
        Route::ThreePass => "three-pass",
        Route::Prefill => "prefill",
        Route::Decode => "decode",
    }
}

/// What will run, a fact a line.
fn explain(gpu: &Gpu, problem: &Problem, plan: &Plan) -> String {
    let mut text = format!("device      {}\n", gpu.caps().name);
    let mut line = |name: &str, value: String| text += &format!("{name:<12}{value}\n");
    line("route", route_name(plan.route).to_string());
    line("chosen", plan.candidate.to_string());
    if let Some((few, candidate)) = plan.short {
        let who = if few == 1 {
            "one query"
        } else {
            &format!("{few} queries at most")
        };
        line("short", format!("{candidate}, for sequences of {who}"));
    }
    line("why", why(gpu, problem, plan));
    line(
        "splits",
        format!("{} of {} keys", plan.splits, plan.split_len),
    );
    line("scratch", format!("{} bytes", plan.scratch * 4));
    let groups: u64 = plan.launches.iter().map(|launch| launch.groups).sum();
    line(
        "launches",
        format!("{}, {groups} workgroups", plan.launches.len()),
    );
    for launch in &plan.launches {
        line("", format!("{} {}", launch.shader.kernel, launch.groups));
    }
    text
}

/// Why the plan is what it is.
fn why(gpu: &Gpu, problem: &Problem, plan: &Plan) -> String {
    let bucket = problem.bucket();
    match (plan.tuned, bucket) {
        (true, Some(bucket)) => {
            let choice = gpu.choice(&bucket).unwrap_or_default();
            let times = choice.split_once("; ").map_or("", |(_, times)| times);
            format!("tuned for {bucket}: {times}")
        }
        (_, Some(bucket)) => format!("by the table of capabilities; {bucket} is not tuned"),
        (_, None) => "as asked for, or by the table of capabilities: not to be tuned".to_string(),
    }
}
