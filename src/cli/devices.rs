//! `qkv devices`.

use clap::Args;
use qkv::Result;
use qkv::gpu::{AdapterReport, adapters};

use super::say;

#[derive(Args)]
pub struct Options {
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

pub fn run(options: &Options, device: Option<&str>) -> Result<()> {
    let found = adapters(device)?;
    for adapter in &found {
        match options.json {
            true => say(format_args!("{}\n", json(adapter)))?,
            false => say(format_args!("{}\n", text(adapter)))?,
        }
    }
    Ok(())
}

pub fn text(adapter: &AdapterReport) -> String {
    let caps = &adapter.caps;
    let shapes: Vec<String> = caps
        .cooperative
        .iter()
        .map(|s| format!("{}x{}x{} {} -> {}", s.m, s.n, s.k, s.ab, s.cr))
        .collect();
    let subgroups = match caps.subgroups {
        Some((least, most)) if least == most => format!("{least}"),
        Some((least, most)) => format!("{least} to {most}"),
        None => "none".into(),
    };
    let mut lines = vec![format!(
        "{} = {} ({}, {})",
        adapter.number, caps.name, adapter.kind, adapter.backend
    )];
    let mut line = |name: &str, value: String| lines.push(format!("    {name:<22}{value}"));
    line("driver", adapter.driver.clone());
    line("f16", if caps.f16 { "yes" } else { "no" }.into());
    line("subgroup size", subgroups);
    line(
        "cooperative matrices",
        if shapes.is_empty() {
            "none".into()
        } else {
            shapes.join(", ")
        },
    );
    line(
        "timestamps",
        if caps.timestamps { "yes" } else { "no" }.into(),
    );
    line(
        "workgroup",
        format!(
            "{} threads, {} KiB",
            caps.invocations,
            caps.workgroup_memory / 1024
        ),
    );
    line("workgroups a dimension", caps.max_groups.to_string());
    line(
        "storage bindings",
        format!(
            "{} of at most {} MiB",
            caps.storage_buffers,
            caps.max_binding >> 20
        ),
    );
    line("largest buffer", format!("{} MiB", caps.max_buffer >> 20));
    if let Some(why) = &adapter.chosen {
        line("chosen", why.clone());
    }
    lines.join("\n")
}

pub fn json(adapter: &AdapterReport) -> serde_json::Value {
    let caps = &adapter.caps;
    let shapes: Vec<serde_json::Value> = caps
        .cooperative
        .iter()
        .map(|s| serde_json::json!({ "m": s.m, "n": s.n, "k": s.k, "ab": s.ab, "cr": s.cr }))
        .collect();
    serde_json::json!({
        "number": adapter.number,
        "name": caps.name,
        "kind": adapter.kind,
        "backend": adapter.backend,
        "driver": adapter.driver,
        "f16": caps.f16,
        "subgroup_size": caps.subgroups.map(|(least, most)| [least, most]),
        "cooperative_matrices": shapes,
        "timestamps": caps.timestamps,
        "workgroup_threads": caps.invocations,
        "workgroup_memory": caps.workgroup_memory,
        "workgroups_per_dimension": caps.max_groups,
        "storage_buffers": caps.storage_buffers,
        "max_binding": caps.max_binding,
        "max_buffer": caps.max_buffer,
        "chosen": adapter.chosen,
    })
}
