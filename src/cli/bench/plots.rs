//! The pictures of the page, as SVG. Their colours are names: the page's style sheet says what they look like
//! by day and by night.

use std::ops::Range;

use plotters::coord::combinators::LogCoord;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use qkv::{Error, Result};

use super::report::{Entry, Report};
use super::shape::Shape;

/// What stands for a colour, and the style sheet's variable for it.
pub const COLOURS: [(RGBColor, &str); 10] = [
    (INK, "ink"),
    (FAINT, "faint"),
    (GROUND, "ground"),
    (RGBColor(1, 0, 1), "three-pass"),
    (RGBColor(1, 0, 2), "prefill"),
    (RGBColor(1, 0, 3), "decode"),
    (RGBColor(1, 0, 4), "ort"),
    (RGBColor(1, 0, 5), "burn"),
    (RGBColor(1, 0, 6), "ggml"),
    (RGBColor(1, 0, 7), "torch"),
];
/// The last of them.
pub const PEERS: [&str; 4] = ["ort", "burn", "ggml", "torch"];
const INK: RGBColor = RGBColor(1, 1, 1);
const FAINT: RGBColor = RGBColor(1, 1, 2);
const GROUND: RGBColor = RGBColor(1, 1, 3);

/// A picture with its heading.
pub struct Plot {
    pub title: String,
    pub svg: String,
}

fn colour(route: &str) -> RGBColor {
    let found = COLOURS.iter().find(|(_, name)| *name == route);
    found.map_or(INK, |&(colour, _)| colour)
}

/// A figure on an axis: 0.05, 20, 3 k.
fn figure(x: &f64) -> String {
    let x = *x;
    match x {
        _ if x >= 1e6 => format!("{} M", short(x / 1e6)),
        _ if x >= 1e3 => format!("{} k", short(x / 1e3)),
        _ => short(x),
    }
}

/// Three digits, and no zeros behind them.
fn short(x: f64) -> String {
    let digits = (2 - x.abs().max(1e-9).log10().floor() as i32).clamp(0, 9) as usize;
    let text = format!("{x:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// All of them, and some room on both sides.
fn around(values: impl Iterator<Item = f64>, room: f64) -> Range<f64> {
    let finite = values.filter(|x| x.is_finite() && *x > 0.0);
    let (low, high) = finite.fold((f64::INFINITY, 0f64), |(low, high), x| {
        (low.min(x), high.max(x))
    });
    match low.is_finite() {
        true => low / room..high * room,
        false => 0.1..10.0,
    }
}

type Area<'s> = DrawingArea<SVGBackend<'s>, plotters::coord::Shift>;
type LogChart<'a, 's> = ChartContext<'a, SVGBackend<'s>, Cartesian2d<LogCoord<f64>, LogCoord<f64>>>;

fn draw(
    size: (u32, u32),
    axes: [&str; 2],
    [x, y]: [Range<f64>; 2],
    paint: impl FnOnce(&mut LogChart) -> std::result::Result<(), Box<dyn std::error::Error>>,
) -> Result<String> {
    let mut svg = String::new();
    let area: Area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    let done = (|| -> std::result::Result<(), Box<dyn std::error::Error>> {
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(20)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(x.log_scale(), y.log_scale())?;
        let text = ("sans-serif", 13).into_font().color(&INK);
        chart
            .configure_mesh()
            .bold_line_style(FAINT)
            .light_line_style(TRANSPARENT)
            .axis_style(FAINT)
            .label_style(text.clone())
            .axis_desc_style(text)
            .x_desc(axes[0])
            .y_desc(axes[1])
            .x_labels(7)
            .y_labels(7)
            .x_label_formatter(&figure)
            .y_label_formatter(&figure)
            .draw()?;
        paint(&mut chart)?;
        area.present()?;
        Ok(())
    })();
    drop(area);
    match done {
        Ok(()) => Ok(svg),
        Err(e) => Err(Error::refused("a plot", e, "what plotters can draw")),
    }
}

/// A point: filled in f32, a ring in f16.
fn point(
    chart: &mut LogChart,
    entry: &Entry,
    at: (f64, f64),
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let route = colour(&entry.route);
    let inside = if entry.shape.f16 { GROUND } else { route };
    chart.draw_series([
        Circle::new(at, 5, inside.filled()),
        Circle::new(at, 5, route.stroke_width(2)),
    ])?;
    Ok(())
}

/// Rates against work for each byte, under the device's measured limits.
pub fn roofline(report: &Report) -> Result<Plot> {
    // What does not run on the device is not under its roof.
    let entries = || {
        let all = report.entries.iter();
        all.filter(|entry| entry.counts() && entry.is_on_device())
    };
    let place = |entry: &Entry| (entry.shape.flop() / entry.shape.bytes(), entry.gflops);
    let mut roofs = vec![("f32", report.limits.f32)];
    roofs.extend(report.limits.f16.map(|rates| ("f16", rates)));
    let (read, _) = report.limits.reads();
    let ridges = roofs.iter().map(|(_, r)| r.gflops / read);
    let x = around(entries().map(|e| place(e).0).chain(ridges), 2.0);
    let tops = roofs.iter().map(|(_, r)| r.gflops);
    let y = around(entries().map(|e| place(e).1).chain(tops), 2.0);
    let svg = draw(
        (900, 460),
        ["FLOP for each byte of Q, K, V and O", "GFLOP/s"],
        [x.clone(), y.clone()],
        |chart| {
            for (ix, (name, rates)) in roofs.iter().enumerate() {
                // From the left or lower edge to the ridge, and on to the right edge.
                let ridge = rates.gflops / read;
                let from = x.start.max(y.start / read).min(ridge);
                let line = [from, ridge, x.end].map(|x| (x, rates.gflops.min(read * x)));
                let style = INK.stroke_width(2);
                match ix {
                    0 => chart.draw_series(LineSeries::new(line, style))?,
                    _ => chart.draw_series(DashedLineSeries::new(line, 6, 5, style))?,
                };
                let below = if ix == 0 { VPos::Bottom } else { VPos::Top };
                let text = ("sans-serif", 13).into_font().color(&INK);
                let text = text.pos(Pos::new(HPos::Right, below));
                let shift = if ix == 0 { 1.05 } else { 0.9 };
                let at = (x.end * 0.97, rates.gflops * shift);
                let label = format!("{name}, {} GFLOP/s", short(rates.gflops));
                chart.draw_series([Text::new(label, at, text)])?;
            }
            for entry in entries() {
                point(chart, entry, place(entry))?;
            }
            Ok(())
        },
    )?;
    Ok(Plot {
        title: "What is reached of the device".into(),
        svg,
    })
}

/// Shapes that differ in length alone.
fn family(shape: &Shape) -> Shape {
    Shape {
        q_len: if shape.is_decode() { 1 } else { 0 },
        k_len: 0,
        f16: false,
        ..*shape
    }
}

/// Time against length, a picture for the shapes that differ in length alone.
pub fn lengths(report: &Report) -> Result<Vec<Plot>> {
    let mut families: Vec<Shape> = Vec::new();
    for entry in &report.entries {
        let family = family(&entry.shape);
        if !families.contains(&family) {
            families.push(family);
        }
    }
    let mut plots = Vec::new();
    for of in families {
        let own: Vec<&Entry> = report
            .entries
            .iter()
            .filter(|e| family(&e.shape) == of)
            .collect();
        if own
            .iter()
            .all(|entry| entry.shape.k_len == own[0].shape.k_len)
        {
            continue;
        }
        let x = around(own.iter().map(|e| f64::from(e.shape.k_len)), 1.3);
        let y = around(own.iter().flat_map(|e| [e.ms.low, e.ms.high]), 1.5);
        let svg = draw((520, 360), ["keys", "ms"], [x, y], |chart| {
            for (route, f16) in ["three-pass", "prefill", "decode"]
                .into_iter()
                .chain(PEERS)
                .flat_map(|route| [(route, false), (route, true)])
            {
                let mut line: Vec<&&Entry> = own
                    .iter()
                    .filter(|e| e.route == route && e.shape.f16 == f16)
                    .collect();
                // What a plan tuned, where it is on the route too.
                line.sort_by_key(|entry| (entry.shape.k_len, !entry.chosen));
                line.dedup_by_key(|entry| entry.shape.k_len);
                let at = |entry: &Entry, ms| (f64::from(entry.shape.k_len), ms);
                let clear = || line.iter().filter(|entry| entry.counts());
                let points: Vec<(f64, f64)> = clear().map(|e| at(e, e.ms.median)).collect();
                let style = colour(route).stroke_width(2);
                match f16 {
                    false => chart.draw_series(LineSeries::new(points, style))?,
                    true => chart.draw_series(DashedLineSeries::new(points, 6, 5, style))?,
                };
                for entry in &line {
                    let ends = vec![at(entry, entry.ms.low), at(entry, entry.ms.high)];
                    chart.draw_series([PathElement::new(ends, colour(route).stroke_width(1))])?;
                }
                for entry in clear() {
                    point(chart, entry, at(entry, entry.ms.median))?;
                }
            }
            Ok(())
        })?;
        let Shape {
            batch,
            heads,
            kv_heads,
            dim,
            causal,
            ..
        } = of;
        let what = match (of.is_decode(), causal) {
            (true, _) => "one query",
            (false, true) => "many queries, causal",
            (false, false) => "many queries",
        };
        plots.push(Plot {
            title: format!("B {batch}, H {heads}, Hk {kv_heads}, D {dim}: {what}"),
            svg,
        });
    }
    Ok(plots)
}

/// Worst errors against length, below what is allowed.
pub fn errors(report: &Report) -> Result<Plot> {
    // Nothing is exact enough to be seen below this.
    let error = |entry: &Entry| entry.error.max(1e-4);
    let x = around(report.entries.iter().map(|e| f64::from(e.shape.k_len)), 1.3);
    let y = around(report.entries.iter().map(error).chain([1.0]), 2.0);
    let svg = draw(
        (900, 340),
        ["keys", "of what is allowed"],
        [x.clone(), y],
        |chart| {
            let limit = [(x.start, 1.0), (x.end, 1.0)];
            chart.draw_series(DashedLineSeries::new(limit, 6, 5, INK.stroke_width(2)))?;
            for entry in &report.entries {
                point(chart, entry, (f64::from(entry.shape.k_len), error(entry)))?;
            }
            Ok(())
        },
    )?;
    Ok(Plot {
        title: "Worst error beside the oracle in f64".into(),
        svg,
    })
}
