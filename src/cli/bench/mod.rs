//! `qkv bench`: attention verified, then timed on the device's clock, beside what the device does at most.

mod html;
mod measure;
mod peers;
mod plots;
mod report;
mod shape;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use qkv::attention::Route;
use qkv::gpu::{self, Gpu, Stream, adapters};
use qkv::{Error, Result};

use super::attend::route_name;
use super::{Device, progress, say, write_whole};
use measure::Inputs;
use peers::Peers;
pub use report::{Entry, Facts, Report};
use report::{Limits, NOISY, Rates, Refused};
use shape::{Shape, Suite};

#[derive(Args)]
pub struct Options {
    /// Sizes, as in 1,8,8,512,512,64,causal,f16; without any, and without --suite, prefill and decode
    #[arg(value_name = "B,H,Hk,Q,K,D[,causal][,f16]")]
    shapes: Vec<Shape>,
    /// Shapes of ours, in f32 and f16
    #[arg(long, value_enum, value_delimiter = ',')]
    suite: Vec<Suite>,
    /// The ways to compute them, and beside them the plan's own choice; that alone if not given, for the suite
    /// `lengths` all
    #[arg(long, value_enum, value_delimiter = ',')]
    routes: Vec<RouteName>,
    /// Other programs in turn with ours; if none is named, ort and torch
    #[arg(long, value_enum, value_name = "PEER", value_delimiter = ',')]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "ort,torch")]
    peers: Vec<peers::Name>,
    /// The Python that has the packages of ort, ggml and torch
    #[arg(
        long,
        value_name = "PROGRAM",
        default_value = "python3",
        requires = "peers"
    )]
    python: PathBuf,
    /// burn's program: `cargo install --path benches/peers/burn`
    #[arg(
        long,
        value_name = "PROGRAM",
        default_value = "burn-attend",
        requires = "peers"
    )]
    burn: PathBuf,
    /// How long a peer may take for an answer; some compile for minutes before their first
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0, value_parser = seconds, requires = "peers")]
    peer_timeout: f64,
    /// About how long each route and peer is timed on each shape
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// Everything measured, for `qkv compare`
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A line a figure
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// A page to look at
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum RouteName {
    Planned,
    ThreePass,
    Prefill,
    Decode,
    All,
}

fn seconds(text: &str) -> std::result::Result<f64, String> {
    let n: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    match (0.0..=3600.0).contains(&n) {
        true => Ok(n),
        false => Err("from 0 to 3600".into()),
    }
}

impl Options {
    /// The shapes and, of each, the routes.
    fn work(&self, has_f16: bool) -> Vec<(Shape, Vec<Option<Route>>)> {
        let all = Route::ALL.map(Some).to_vec();
        let planned = match self.routes.as_slice() {
            [] => vec![None],
            names => names.iter().fold(Vec::new(), |mut routes, name| {
                let more = match name {
                    RouteName::Planned => vec![None],
                    RouteName::ThreePass => vec![Some(Route::ThreePass)],
                    RouteName::Prefill => vec![Some(Route::Prefill)],
                    RouteName::Decode => vec![Some(Route::Decode)],
                    RouteName::All => all.clone(),
                };
                for route in more {
                    if !routes.contains(&route) {
                        routes.push(route);
                    }
                }
                routes
            }),
        };
        // A shape that is named twice, or in a suite too, is measured once, on all of its routes.
        let mut work: Vec<(Shape, Vec<Option<Route>>)> = Vec::new();
        let mut add = |shape: Shape, routes: &[Option<Route>]| {
            let at = work.iter().position(|(known, _)| *known == shape);
            let at = at.unwrap_or_else(|| {
                work.push((shape, Vec::new()));
                work.len() - 1
            });
            for route in routes {
                if !work[at].1.contains(route) {
                    work[at].1.push(*route);
                }
            }
        };
        for &shape in &self.shapes {
            add(shape, &planned);
        }
        let suites = match (self.suite.as_slice(), self.shapes.as_slice()) {
            ([], []) => &[Suite::Prefill, Suite::Decode],
            (suites, _) => suites,
        };
        for suite in suites {
            let routes = match suite {
                Suite::Lengths if self.routes.is_empty() => &all,
                _ => &planned,
            };
            for shape in suite.shapes(has_f16) {
                add(shape, routes);
            }
        }
        work
    }
}

/// Exit code 1 where an answer of ours is wrong.
pub fn run(options: &Options, device: &Device) -> Result<ExitCode> {
    let timeout = Duration::from_secs_f64(options.peer_timeout);
    let peers = match options.peers.as_slice() {
        [] => None,
        names => Some(Peers::new(names, &options.python, &options.burn, timeout)?),
    };
    let gpu = device.open()?;
    let work = options.work(gpu.caps().f16);
    if let Some((shape, _)) = work.iter().find(|(shape, _)| shape.f16 && !gpu.caps().f16) {
        let bound = "f32: this device has no f16 in shaders";
        return Err(Error::refused("a shape", shape, bound));
    }
    let stream = Stream::new(&gpu)?;
    let before = limits(&stream.limits(&gpu)?);
    let mut report = Report {
        qkv: env!("CARGO_PKG_VERSION").into(),
        device: facts(&gpu, device.wanted)?,
        limits: before,
        entries: Vec::new(),
        refused: Vec::new(),
    };
    say(format_args!("{}", heading(&report)))?;

    let flush = stream.reading(&gpu)?;
    let bar = progress(work.len() as u64, "{bar:30} {pos} of {len} shapes, {msg}");
    let mut is_wrong = false;
    for (shape, routes) in work {
        bar.set_message(shape.to_string());
        let not_measured = |route: &str, why: String| Refused {
            shape,
            route: route.into(),
            why,
        };
        let inputs = match Inputs::new(&gpu, shape) {
            Ok(inputs) => inputs,
            Err(error @ (Error::Refused { .. } | Error::OutOfMemory(_))) => {
                let one = not_measured("all", error.to_string());
                bar.suspend(|| say(format_args!("{}", refusal(&one))))?;
                report.refused.push(one);
                save_report(options, &report)?;
                bar.inc(1);
                continue;
            }
            Err(error) => return Err(error),
        };
        let mut ways = Vec::new();
        let mut refused = Vec::new();
        let mut routes = std::collections::VecDeque::from(routes);
        while let Some(route) = routes.pop_front() {
            let name = route.map_or("planned", route_name);
            match inputs.way(route) {
                Ok(way) => match &way.verdict {
                    Ok(_) => ways.push(way),
                    Err(said) => {
                        is_wrong = true;
                        refused.push(not_measured(name, format!("WRONG: {said}")));
                    }
                },
                Err(error @ (Error::Refused { .. } | Error::OutOfMemory(_))) => {
                    refused.push(not_measured(name, error.to_string()));
                }
                Err(error) => return Err(error),
            }
            // What the plan takes, which the others are held against, may be none of them once it is tuned.
            let is_last = routes.is_empty() && route.is_some();
            if is_last && !ways.is_empty() && !ways.iter().any(|way| way.chosen) {
                routes.push_back(None);
            }
        }
        // The plan's choice may be one of the routes that were asked for.
        let mut seen = Vec::new();
        ways.retain(|way| {
            let new = !seen.contains(&way.plan.launches);
            seen.push(way.plan.launches.clone());
            new
        });
        let mut ready = Vec::new();
        if let Some(peers) = &peers {
            for (name, peer) in peers.start(&shape, inputs.floats())? {
                match peer {
                    Ok(peer) => ready.push(peer),
                    Err(why) => refused.push(not_measured(name.word(), why)),
                }
            }
        }
        let (entries, failed) =
            inputs.time(&mut ways, &mut ready, &flush, &before, options.seconds)?;
        refused.extend(failed);
        for way in &ways {
            if let Err(said) = &way.verdict {
                is_wrong = true;
                let name = route_name(way.plan.route);
                refused.push(not_measured(name, format!("WRONG: {said}")));
            }
        }
        for entry in &entries {
            bar.suspend(|| say(format_args!("{}\n", line(entry))))?;
        }
        for one in &refused {
            bar.suspend(|| say(format_args!("{}", refusal(one))))?;
        }
        report.entries.extend(entries);
        report.refused.extend(refused);
        // A run that is stopped keeps what it has.
        save_report(options, &report)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    gpu.save_pipelines();

    // Others' work and heat come and go: what the limits were before says little of an hour later.
    report.limits = before.with(&limits(&stream.limits(&gpu)?));
    report.judge();
    say(format_args!("{}", shares(&report)))?;
    save_report(options, &report)?;
    if let Some(path) = &options.csv {
        write(path, report.csv())?;
    }
    if let Some(path) = &options.html {
        write(path, html::page(&report)?)?;
    }
    Ok(ExitCode::from(u8::from(is_wrong)))
}

fn save_report(options: &Options, report: &Report) -> Result<()> {
    let Some(path) = &options.json else {
        return Ok(());
    };
    let json = serde_json::to_string_pretty(report).map_err(|e| Error::file(path, e))?;
    write(path, format!("{json}\n"))
}

fn write(path: &Path, text: String) -> Result<()> {
    write_whole(path, |part| {
        std::fs::write(part, text).map_err(|e| Error::file(path, e))
    })
}

fn facts(gpu: &Gpu, device: Option<&str>) -> Result<Facts> {
    let adapters = adapters(device)?;
    let chosen = adapters
        .into_iter()
        .find(|adapter| adapter.chosen.is_some());
    let chosen = chosen.ok_or_else(|| Error::NoAdapter("the device is gone".into()))?;
    let caps = gpu.caps();
    Ok(Facts {
        name: caps.name.clone(),
        kind: chosen.kind.into(),
        backend: chosen.backend,
        driver: chosen.driver,
        subgroups: caps.subgroups,
        f16: caps.f16,
        workgroup_memory: caps.workgroup_memory,
        max_binding: caps.max_binding,
        timestamps: caps.timestamps,
    })
}

fn limits(measured: &gpu::Limits) -> Limits {
    let rates = |rates: gpu::Rates| Rates {
        gflops: rates.flops / 1e9,
        read_gb_s: rates.read / 1e9,
        copy_gb_s: rates.copy / 1e9,
        noise: [0.0; 3],
    };
    Limits {
        f32: rates(measured.f32),
        f16: measured.f16.map(rates),
    }
}

/// A rate of so many thousand million operations, in words.
fn flops(gflops: f64) -> String {
    match gflops {
        n if n >= 1e3 => format!("{:.2} TFLOP/s", n / 1e3),
        n => format!("{n:.1} GFLOP/s"),
    }
}

/// Each rate, and how far both measurements of it are apart where that is much.
fn limit_lines(limits: &Limits) -> String {
    let mut types = vec![("f32", limits.f32)];
    types.extend(limits.f16.map(|rates| ("f16", rates)));
    let lines = types
        .into_iter()
        .map(|(name, rates)| format!("limits in {name}: {}\n", limit_line(&rates)));
    lines.collect()
}

fn limit_line(rates: &Rates) -> String {
    let noise = rates.noise.map(|noise| match noise > NOISY {
        true => format!(" (too noisy: the other time {} less)", percent(noise)),
        false => String::new(),
    });
    format!(
        "{} of multiply-adds{}, reads {:.1} GB/s{}, copies {:.1} GB/s{}",
        flops(rates.gflops),
        noise[0],
        rates.read_gb_s,
        noise[1],
        rates.copy_gb_s,
        noise[2],
    )
}

/// The limits, now that they were measured twice, and what share of them each entry reaches.
fn shares(report: &Report) -> String {
    let limits = limit_lines(&report.limits);
    let mut text = format!("\nthe better of before and after:\n{limits}\n");
    text += &format!("{:33}{:12}of the limit\n", "B,H,Hk,Q,K,D", "route");
    let entries = report.entries.iter();
    for entry in entries.filter(|entry| entry.is_on_device() && entry.counts()) {
        let (shape, share) = (entry.shape.to_string(), share(entry));
        text += &format!("{shape:33}{:12}{share}\n", name(entry));
    }
    text
}

/// What share of its limit an entry reaches, in words.
fn share(entry: &Entry) -> String {
    match (entry.limit_noisy, entry.share) {
        (true, _) => "limit too noisy".into(),
        (false, share) => share.map_or(String::new(), percent),
    }
}

/// An entry's route, with a star where the plan takes it by itself.
fn name(entry: &Entry) -> String {
    let star = if entry.chosen { " *" } else { "" };
    format!("{}{star}", entry.route)
}

fn heading(report: &Report) -> String {
    let device = &report.device;
    let mut text = format!("{} ({}, {})\n", device.name, device.driver, device.backend);
    text += &limit_lines(&report.limits);
    if !device.timestamps {
        text += "times are by the host's clock: the device has none\n";
    }
    text + &format!(
        "\n{:33}{:12}{:>11}{:>7}{:>16}{:>7}{:>10}{:>10}{:>7}  {}\n",
        "B,H,Hk,Q,K,D",
        "route",
        "median ms",
        "+-",
        "rate",
        "ratio",
        "host ms",
        "first ms",
        "error",
        "plan"
    )
}

/// What bounds a shape, at the rate that was reached.
fn line_rate(entry: &Entry) -> String {
    match entry.shape.is_decode() {
        true => format!("{:.2} GB/s", entry.gb_s),
        false => flops(entry.gflops),
    }
}

fn refusal(one: &Refused) -> String {
    let (shape, route, why) = (one.shape.to_string(), &one.route, &one.why);
    format!("{shape:33}{route:12}{why}\n")
}

/// The figures of an entry; no rate where it is too noisy for one.
fn line(entry: &Entry) -> String {
    let noise = entry.ms.noise() * 100.0;
    let rate = match entry.ms.is_noisy() {
        true => "too noisy".into(),
        false => line_rate(entry),
    };
    let maybe = |x: Option<f64>, show: &dyn Fn(f64) -> String| x.map_or(String::new(), show);
    let plan = match &entry.peer {
        Some(peer) if !peer.right => format!("WRONG, {}; {}", off(peer), entry.plan),
        _ => entry.plan.clone(),
    };
    format!(
        "{:33}{:12}{:11.4}{noise:5.0} %{rate:>16}{:>7}{:>10}{:10.0}{:>7}  {plan}",
        entry.shape.to_string(),
        name(entry),
        entry.ms.median,
        maybe(entry.ratio, &|n| format!("{n:.2}")),
        maybe(entry.host_ms, &|ms| format!("{ms:.3}")),
        entry.first_ms,
        error(entry.error),
    )
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// How wrong a peer is, in parts of the exact answer's root mean square.
fn off(peer: &report::Peer) -> String {
    let percent = |x: f64| match x {
        x if x < 0.1 => format!("{:.1} %", x * 100.0),
        x => percent(x),
    };
    let (rms, max) = (percent(peer.rms_error), percent(peer.max_error));
    format!("off by {rms} in the mean square and {max} at worst")
}

/// An error in units of what is allowed; those of peers may be of any size.
fn error(error: f64) -> String {
    match error < 100.0 {
        true => format!("{error:.3}"),
        false => format!("{error:.0e}"),
    }
}
