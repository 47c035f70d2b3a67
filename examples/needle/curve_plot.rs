//! Bits per byte and retrieval over block length, a line for each `top_k`.

use plotters::coord::Shift;
use plotters::prelude::*;
use tokenselect_examples::plot::{Drawing, Drawn, FONT, GREY};

use crate::curves::{Curves, Point};

/// Both curves, side by side.
pub struct CurvePlot<'a> {
    /// What was measured.
    pub curves: &'a Curves,
}

/// Distinct in colour and in brightness.
const LINES: [RGBColor; 5] = [
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 0, 0),
    RGBColor(204, 121, 167),
    RGBColor(0, 158, 115),
];

impl Drawing for CurvePlot<'_> {
    fn size(&self) -> (u32, u32) {
        (1000, 400)
    }

    fn draw<DB: DrawingBackend>(&self, canvas: &DrawingArea<DB, Shift>) -> Drawn<DB> {
        canvas.fill(&WHITE)?;
        let halves = canvas.split_evenly((1, 2));
        let dense = self.curves.dense_inside_context;
        let bits = |point: &Point| point.bits_per_byte;
        let highest = self.curves.points.iter().map(bits).fold(dense, f64::max);
        let lowest = self.curves.points.iter().map(bits).fold(dense, f64::min);
        let range = lowest - 0.05..highest + 0.05;
        self.draw_lines(&halves[0], "bits per byte", range, Some(dense), bits)?;
        let found = |point: &Point| 100.0 * point.retrieval.share();
        self.draw_lines(&halves[1], "keys found, %", 0.0..105.0, None, found)
    }
}

impl CurvePlot<'_> {
    fn draw_lines<DB: DrawingBackend>(
        &self,
        panel: &DrawingArea<DB, Shift>,
        what: &str,
        range: std::ops::Range<f64>,
        dense: Option<f64>,
        of: impl Fn(&Point) -> f64,
    ) -> Drawn<DB> {
        let points = &self.curves.points;
        let block = |point: &Point| point.retrieval.settings.block as f64;
        let (first, last) = points.iter().map(block).fold((f64::INFINITY, 2.0), |(first, last), block| {
            (f64::min(first, block), f64::max(last, block))
        });
        let mut chart = ChartBuilder::on(panel)
            .caption(what, (FONT, 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(48)
            .build_cartesian_2d((first.min(last / 2.0)..last).log_scale().base(2.0), range)?;
        chart
            .configure_mesh()
            .x_desc("tokens of a block (logarithmic)")
            .x_label_formatter(&|x| x.to_string())
            .y_label_formatter(&|y| format!("{}", (y * 100.0).round() / 100.0))
            .label_style((FONT, 14))
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.12))
            .draw()?;
        let mut values: Vec<usize> = points.iter().map(|point| point.retrieval.settings.top_k).collect();
        values.sort_unstable();
        values.dedup();
        for (top_k, colour) in values.into_iter().zip(LINES.into_iter().cycle()) {
            let line: Vec<(f64, f64)> = points
                .iter()
                .filter(|point| point.retrieval.settings.top_k == top_k)
                .map(|point| (block(point), of(point)))
                .collect();
            chart.draw_series(line.iter().map(|&point| Circle::new(point, 3, colour.filled())))?;
            chart
                .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
                .label(format!("top_k {top_k}"))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
        }
        if let Some(dense) = dense {
            chart
                .draw_series(DashedLineSeries::new(
                    [(first, dense), (last, dense)],
                    6,
                    5,
                    GREY.stroke_width(1),
                ))?
                .label("dense, inside the training context")
                .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], GREY.stroke_width(1)));
        }
        chart
            .configure_series_labels()
            .position(if dense.is_some() {
                SeriesLabelPosition::UpperLeft
            } else {
                SeriesLabelPosition::LowerLeft
            })
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.25))
            .label_font((FONT, 14))
            .draw()
    }
}
