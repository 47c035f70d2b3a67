//! Bits per byte over position, as SVG.

use std::fs;
use std::path::Path;

use plotters::prelude::*;

use crate::error::{Error, Result};
use crate::model::Model;
use crate::pass::Pass;

/// Points of a curve in an octave of positions.
const POINTS_PER_OCTAVE: f64 = 4.0;
/// The first point averages the bytes before this position: fewer would only show noise.
const FIRST_POINT: f64 = 128.0;
const SIZE: (u32, u32) = (900, 520);
const SELECTED: RGBColor = RGBColor(0, 98, 178);
const DENSE: RGBColor = RGBColor(204, 72, 20);
const CONTEXT: RGBColor = RGBColor(96, 96, 96);

/// Draws both curves to a file.
pub fn write(path: &Path, model: &Model, selected: &Pass, dense: &Pass) -> Result<()> {
    let svg = draw(model, selected, dense)?;
    fs::write(path, svg).map_err(|source| Error::Write { path: path.to_owned(), source })
}

/// Means over ranges of positions that grow with the position: (the range's middle, bits per byte).
fn curve(pass: &Pass) -> Vec<(f64, f64)> {
    let tokens = pass.bits.len() + 1;
    let edge = |i: u32| (FIRST_POINT * (f64::from(i) / POINTS_PER_OCTAVE).exp2()).round() as usize;
    let mut points = Vec::new();
    let mut from = 0;
    for i in 0.. {
        // What is left over at the end joins the last range, unless it is most of a range itself.
        let to = if edge(i) + edge(i + 1) > 2 * tokens { tokens } else { edge(i) };
        points.push(((from + to) as f64 / 2.0, pass.bits_per_byte(from, to)));
        from = to;
        if to == tokens {
            break;
        }
    }
    points
}

fn draw(model: &Model, selected: &Pass, dense: &Pass) -> Result<String> {
    let curves = [("dense attention", DENSE, curve(dense)), ("token selection", SELECTED, curve(selected))];
    let tokens = (selected.bits.len() + 1) as f64;
    // At least four octaves: on a shorter axis the labels are no powers of two.
    let first = curves[0].2[0].0.min(tokens / 16.0).log2().floor().exp2();
    let highest = curves.iter().flat_map(|curve| &curve.2).fold(1.0, |highest: f64, p| highest.max(p.1));
    let top = (highest * 1.1).ceil();
    let context = model.config.training_context as f64;

    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(format!("{}: bits per byte by position", model.name), ("sans-serif", 22))
            .margin(16)
            .x_label_area_size(48)
            .y_label_area_size(56)
            .build_cartesian_2d((first..tokens).log_scale().base(2.0), 0.0..top)?;
        chart
            .configure_mesh()
            .x_desc("position in the text, bytes (logarithmic)")
            .y_desc("bits per byte")
            .x_label_formatter(&|x| x.to_string())
            .y_label_formatter(&|y| format!("{}", (y * 100.0).round() / 100.0))
            .label_style(("sans-serif", 16))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        if (first..tokens).contains(&context) {
            chart
                .draw_series(DashedLineSeries::new(
                    [(context, 0.0), (context, top)],
                    6,
                    5,
                    CONTEXT.stroke_width(1),
                ))?
                .label(format!("training context, {} tokens", model.config.training_context))
                .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], CONTEXT.stroke_width(1)));
        }
        for (name, colour, points) in curves {
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.25))
            .label_font(("sans-serif", 16))
            .margin(12)
            .draw()?;
        root.present()?;
    }
    Ok(svg)
}
