//! A page to look at: one file, nothing fetched, no script.

use minijinja::{AutoEscape, Environment, context};
use qkv::{Error, Result};

use super::plots::{self, COLOURS, PEERS, Plot};
use super::report::{Entry, NOISY, Report};
use super::shape::Shape;
use super::{error, limit_line, line_rate, off, share};

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
        let figures = limit_line(&rates);
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
    let peers: Vec<_> = PEERS
        .into_iter()
        .filter(|name| report.entries.iter().any(|entry| entry.route == *name))
        .collect();
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
                peers,
                beside => beside(report),
                refused,
                noisy => NOISY * 100.0,
            },
        )
        .map_err(|e| Error::refused("the page", format_args!("{e:#}"), "a template that renders"))
}

/// Ours and the peers of every shape that peers were asked for, bars as parts of the longest of them.
fn beside(report: &Report) -> Vec<minijinja::Value> {
    let mut shapes: Vec<_> = Vec::new();
    let entries = report.entries.iter().filter(|entry| entry.peer.is_some());
    let failed = || {
        let all = report.refused.iter();
        all.filter(|one| PEERS.contains(&one.route.as_str()))
    };
    for shape in entries
        .map(|entry| entry.shape)
        .chain(failed().map(|one| one.shape))
    {
        if !shapes.contains(&shape) {
            shapes.push(shape);
        }
    }
    let shape = |shape: Shape| {
        let own = report.entries.iter().filter(|entry| entry.shape == shape);
        let own: Vec<_> = own
            .filter(|entry| entry.chosen || entry.peer.is_some())
            .collect();
        let longest = own.iter().map(|entry| entry.ms.median).fold(0.0, f64::max);
        let mut bars: Vec<_> = own
            .iter()
            .map(|entry| {
                let wrong = entry.peer.as_ref().filter(|peer| !peer.right).map(off);
                context! {
                    name => if entry.chosen { "qkv" } else { entry.route.as_str() },
                    route => entry.route.as_str(),
                    ms => format!("{:.3}", entry.ms.median),
                    bar => format!("{:.2}", entry.ms.median / longest * 100.0),
                    ratio => entry.ratio.filter(|_| !entry.chosen).map(|n| format!("{n:.2}")),
                    noise => entry.ms.is_noisy().then(|| format!("{:.0}", entry.ms.noise() * 100.0)),
                    wrong,
                }
            })
            .collect();
        let failed = failed().filter(|one| one.shape == shape);
        bars.extend(failed.map(|one| {
            let route = one.route.as_str();
            context! { name => route, route, why => one.why.as_str() }
        }));
        context! { shape => shape.to_string(), bars }
    };
    shapes.into_iter().map(shape).collect()
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
        wrong => entry.peer.as_ref().filter(|peer| !peer.right).map(off),
        rate => line_rate(entry),
        share => share(entry),
        bar => entry.share.map(|share| format!("{:.1}", (share * 100.0).clamp(0.0, 100.0))),
        ratio => entry.ratio.map(|n| format!("{n:.2}")),
        host => entry.host_ms.map(|ms| format!("{ms:.3}")),
        first => format!("{:.0}", entry.first_ms),
        error => error(entry.error),
        rows => entry.rows,
    }
}
