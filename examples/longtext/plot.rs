//! Bits per byte over position, as SVG or PNG.

use plotters::coord::Shift;
use plotters::prelude::*;
use tokenselect_examples::model::Model;
use tokenselect_examples::plot::{DENSE, Drawing, Drawn, FONT, GREY, SELECTED};

use crate::pass::Pass;

/// Points of a curve in an octave of positions.
const POINTS_PER_OCTAVE: f64 = 4.0;
/// The first point averages the bytes before this position: fewer would only show noise.
const FIRST_POINT: f64 = 128.0;

/// Both curves.
pub struct Plot<'a> {
    /// What was read with.
    pub model: &'a Model,
    /// Token selection.
    pub selected: &'a Pass,
    /// Dense attention.
    pub dense: &'a Pass,
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

impl Drawing for Plot<'_> {
    fn size(&self) -> (u32, u32) {
        (900, 520)
    }

    fn draw<DB: DrawingBackend>(&self, canvas: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        let Plot { model, selected, dense } = self;
        let curves =
            [("dense attention", DENSE, curve(dense)), ("token selection", SELECTED, curve(selected))];
        let tokens = (selected.bits.len() + 1) as f64;
        // At least four octaves: on a shorter axis the labels are no powers of two.
        let first = curves[0].2[0].0.min(tokens / 16.0).log2().floor().exp2();
        let highest = curves.iter().flat_map(|curve| &curve.2).fold(1.0, |highest: f64, p| highest.max(p.1));
        let top = (highest * 1.1).ceil();
        let context = model.config.training_context as f64;
        canvas.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(canvas)
            .caption(format!("{}: bits per byte by position", model.name), (FONT, 22))
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
            .label_style((FONT, 16))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        if (first..tokens).contains(&context) {
            chart
                .draw_series(DashedLineSeries::new(
                    [(context, 0.0), (context, top)],
                    6,
                    5,
                    GREY.stroke_width(1),
                ))?
                .label(format!("training context, {} tokens", model.config.training_context))
                .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], GREY.stroke_width(1)));
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
            .label_font((FONT, 16))
            .margin(12)
            .draw()?;
        Ok(())
    }
}
