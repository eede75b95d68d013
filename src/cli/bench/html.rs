//! A page to look at: one file, nothing fetched, no script.

use minijinja::{AutoEscape, Environment, context};
use qkv::{Error, Result};

use super::plots::{self, COLOURS, Plot};
use super::report::{Entry, NOISY, Report};
use super::{flops, line_rate};

/// The page of a run.
pub fn page(report: &Report) -> Result<String> {
    let mut templates = Environment::new();
    templates.set_auto_escape_callback(|_| AutoEscape::Html);
    let plot = |plot: Plot| context! { title => plot.title, svg => plot.svg };
    let lengths: Vec<_> = plots::lengths(report)?.into_iter().map(plot).collect();
    let colours: Vec<_> = COLOURS
        .iter()
        .map(|(rgb, name)| {
            let plotters::style::RGBColor(r, g, b) = *rgb;
            context! { code => format!("#{r:02X}{g:02X}{b:02X}"), name => *name }
        })
        .collect();
    let device = &report.device;
    let yes = |is: bool| if is { "yes" } else { "no" };
    let mut facts = vec![
        ("driver", device.driver.clone()),
        ("kind", format!("{}, {}", device.kind, device.backend)),
        (
            "subgroups",
            device
                .subgroups
                .map_or("none".into(), |(least, most)| match least == most {
                    true => format!("{least} lanes"),
                    false => format!("{least} to {most} lanes"),
                }),
        ),
        ("f16", yes(device.f16).into()),
        (
            "workgroup memory",
            format!("{} KiB", device.workgroup_memory >> 10),
        ),
        (
            "largest binding",
            format!("{} MiB", device.max_binding >> 20),
        ),
        (
            "clock",
            if device.timestamps {
                "the device's"
            } else {
                "the host's"
            }
            .into(),
        ),
        ("qkv", report.qkv.clone()),
    ];
    let mut rates = vec![("f32", report.limits.f32)];
    rates.extend(report.limits.f16.map(|rates| ("f16", rates)));
    for (name, rates) in rates {
        let figures = format!(
            "{}, reads {:.1} GB/s, copies {:.1} GB/s",
            flops(rates.gflops),
            rates.read_gb_s,
            rates.copy_gb_s
        );
        facts.push((
            if name == "f32" {
                "limits in f32"
            } else {
                "limits in f16"
            },
            figures,
        ));
    }
    let facts: Vec<_> = facts
        .into_iter()
        .map(|(name, value)| context! { name, value })
        .collect();
    let entries: Vec<_> = report.entries.iter().map(row).collect();
    let refused: Vec<_> = report
        .refused
        .iter()
        .map(|one| context! { shape => one.shape.to_string(), route => one.route.as_str(), why => one.why.as_str() })
        .collect();
    templates
        .render_named_str(
            "page.html",
            include_str!("page.html"),
            context! {
                device => device.name.as_str(),
                facts,
                colours,
                roofline => plot(plots::roofline(report)?),
                lengths,
                errors => plot(plots::errors(report)?),
                entries,
                refused,
                noisy => NOISY * 100.0,
            },
        )
        .map_err(|e| Error::refused("the page", format_args!("{e:#}"), "a template that renders"))
}

fn row(entry: &Entry) -> minijinja::Value {
    let noisy = entry.ms.is_noisy();
    context! {
        shape => entry.shape.to_string(),
        route => entry.route.as_str(),
        plan => entry.plan.as_str(),
        chosen => entry.chosen,
        median => format!("{:.4}", entry.ms.median),
        noise => format!("{:.1}", entry.ms.noise() * 100.0),
        noisy,
        rate => line_rate(entry),
        share => format!("{:.0}", entry.share * 100.0),
        bar => format!("{:.1}", (entry.share * 100.0).clamp(0.0, 100.0)),
        ratio => entry.ratio.map(|n| format!("{n:.2}")),
        host => format!("{:.3}", entry.host_ms),
        first => format!("{:.0}", entry.first_ms),
        error => format!("{:.3}", entry.error),
        rows => entry.rows,
    }
}
