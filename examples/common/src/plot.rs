//! Plots as SVG and PNG, with the same drawing code.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Once;

use plotters::coord::Shift;
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::error::{Error, Result};

/// Token selection.
pub const SELECTED: RGBColor = RGBColor(0, 98, 178);
/// Dense attention.
pub const DENSE: RGBColor = RGBColor(204, 72, 20);
/// What is only pointed at.
pub const GREY: RGBColor = RGBColor(96, 96, 96);
/// The font of all labels.
pub const FONT: &str = "sans-serif";

/// Something that is drawn on a canvas of any kind.
pub trait Drawing {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    /// Draws on a canvas of that size.
    ///
    /// # Errors
    /// Those of the canvas.
    fn draw<DB: DrawingBackend>(&self, canvas: &DrawingArea<DB, Shift>) -> Drawn<DB>;
}

/// Result of drawing on a canvas.
pub type Drawn<DB> = std::result::Result<(), DrawingAreaErrorKind<<DB as DrawingBackend>::ErrorType>>;

/// What a drawing is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lines and letters.
    Svg,
    /// Pixels.
    Png,
}

impl Format {
    /// That of a file, by the extension of its name.
    ///
    /// # Errors
    /// [`Error::Option`] for another extension.
    pub fn of(option: &'static str, path: &Path) -> Result<Self> {
        let is = |name| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(name));
        match () {
            () if is("svg") => Ok(Format::Svg),
            () if is("png") => Ok(Format::Png),
            () => Err(Error::option(option, "a file name that ends in .svg or .png", path.display())),
        }
    }
}

/// Writes a drawing.
///
/// # Errors
/// [`Error::Plot`], [`Error::Write`].
pub fn write(path: &Path, format: Format, drawing: &impl Drawing) -> Result<()> {
    let bytes = match format {
        Format::Svg => svg(drawing)?.into_bytes(),
        Format::Png => png(drawing)?,
    };
    fs::write(path, bytes).map_err(|source| Error::Write { path: path.to_owned(), source })
}

/// A drawing as SVG.
///
/// # Errors
/// [`Error::Plot`].
pub fn svg(drawing: &impl Drawing) -> Result<String> {
    use_font();
    let mut svg = String::new();
    let canvas = SVGBackend::with_string(&mut svg, drawing.size()).into_drawing_area();
    drawing.draw(&canvas).and_then(|()| canvas.present()).map_err(plot_error)?;
    drop(canvas);
    Ok(svg)
}

/// A drawing as PNG.
///
/// # Errors
/// [`Error::Plot`].
pub fn png(drawing: &impl Drawing) -> Result<Vec<u8>> {
    use_font();
    let (width, height) = drawing.size();
    let mut pixels = vec![0; width as usize * height as usize * 3];
    let canvas = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
    drawing.draw(&canvas).and_then(|()| canvas.present()).map_err(plot_error)?;
    drop(canvas);
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_compression(png::Compression::High);
    let mut writer = encoder.write_header().map_err(encode_error)?;
    writer.write_image_data(&pixels).and_then(|()| writer.finish()).map_err(encode_error)?;
    Ok(file)
}

/// The font comes with the program, so that a plot is the same on every machine.
fn use_font() {
    static ONCE: Once = Once::new();
    // Only bytes that are no font are refused; where they were, drawing fails and says which font it lacks.
    ONCE.call_once(|| drop(register_font(FONT, FontStyle::Normal, dejavu::sans_condensed::regular())));
}

fn plot_error(source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Plot { source: io::Error::other(source) }
}

fn encode_error(source: png::EncodingError) -> Error {
    Error::Plot { source: io::Error::other(source) }
}
