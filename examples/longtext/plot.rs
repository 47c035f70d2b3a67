//! Bits per byte over position, as SVG or PNG.

use plotters::coord::Shift;
use plotters::prelude::*;
use tokenselect_examples::model::Model;
use tokenselect_examples::plot::{DENSE, Drawing, Drawn, FONT, GREY, SELECTED};

use crate::pass::Found;

/// Points of a curve in an octave of positions.
const POINTS_PER_OCTAVE: f64 = 4.0;
/// The first point averages the bytes before this position: fewer would only show noise.
const FIRST_POINT: f64 = 128.0;

/// Height of title and legend.
const HEAD: i32 = 72;
/// Space at the sides.
const MARGIN: i32 = 16;
/// From one entry of the legend to the next.
const LEGEND_STEP: i32 = 190;

/// A curve for each reading.
pub struct Plot<'a> {
    /// What was read with.
    pub model: &'a Model,
    /// Token selection.
    pub selected: &'a Found,
    /// Dense attention, where it was asked for.
    pub dense: Option<&'a Found>,
}

/// Means over ranges of positions that grow with the position: (the range's middle, bits per byte).
fn curve(found: &Found) -> Vec<(f64, f64)> {
    let tokens = found.tokens();
    let edge = |i: u32| (FIRST_POINT * (f64::from(i) / POINTS_PER_OCTAVE).exp2()).round() as usize;
    let mut points = Vec::new();
    let mut from = 0;
    for i in 0.. {
        // What is left over at the end joins the last range, unless it is most of a range itself.
        let to = if edge(i) + edge(i + 1) > 2 * tokens { tokens } else { edge(i) };
        points.push(((from + to) as f64 / 2.0, found.bits_per_byte(from, to)));
        from = to;
        if to == tokens {
            break;
        }
    }
    points
}

impl Drawing for Plot<'_> {
    fn size(&self) -> (u32, u32) {
        (900, 520)
    }

    fn draw<DB: DrawingBackend>(&self, canvas: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        let Plot { model, selected, dense } = self;
        let mut curves = vec![("token selection", SELECTED, curve(selected))];
        curves.extend(dense.map(|dense| ("dense attention", DENSE, curve(dense))));
        let tokens = selected.tokens() as f64;
        // At least four octaves: on a shorter axis the labels are no powers of two.
        let first = curves[0].2[0].0.min(tokens / 16.0).log2().floor().exp2();
        let highest = curves.iter().flat_map(|curve| &curve.2).fold(1.0, |highest: f64, p| highest.max(p.1));
        let top = (highest * 1.1).ceil();
        let context = model.config.training_context as f64;
        let has_context = (first..tokens).contains(&context);
        canvas.fill(&WHITE)?;
        // The legend is above the curves, not over them.
        let (head, below) = canvas.split_vertically(HEAD);
        let title = format!("{}: bits per byte by position", model.name);
        head.draw(&Text::new(title, (MARGIN, 12), (FONT, 22)))?;
        let context_name = format!("training context, {} tokens", model.config.training_context);
        let mut entries: Vec<_> =
            curves.iter().map(|&(name, colour, _)| (name, colour.stroke_width(2))).collect();
        if has_context {
            entries.push((&context_name, GREY.stroke_width(1)));
        }
        let mut x = MARGIN;
        for (name, style) in entries {
            head.draw(&PathElement::new([(x, HEAD - 14), (x + 22, HEAD - 14)], style))?;
            head.draw(&Text::new(name, (x + 30, HEAD - 22), (FONT, 16)))?;
            x += LEGEND_STEP;
        }
        let mut chart = ChartBuilder::on(&below)
            .margin(MARGIN)
            .x_label_area_size(48)
            .y_label_area_size(56)
            .build_cartesian_2d((first..tokens).log_scale().base(2.0), 0.0..top)?;
        chart
            .configure_mesh()
            .x_desc("position in the text, tokens (logarithmic)")
            .y_desc("bits per byte")
            .x_label_formatter(&|x| x.to_string())
            .y_label_formatter(&|y| format!("{}", (y * 100.0).round() / 100.0))
            .label_style((FONT, 16))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        if has_context {
            let line = [(context, 0.0), (context, top)];
            chart.draw_series(DashedLineSeries::new(line, 6, 5, GREY.stroke_width(1)))?;
        }
        for (_, colour, points) in curves {
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
            chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
        }
        Ok(())
    }
}
