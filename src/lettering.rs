//! Words on pictures, in the program's own font.

use ab_glyph::{Font, FontRef, InvalidFont, PxScale, ScaleFont, point};
use epaint_default_fonts::UBUNTU_LIGHT;
use image::RgbImage;

/// The program's font.
pub struct Lettering(FontRef<'static>);

impl Lettering {
    /// Reads the font.
    ///
    /// # Errors
    /// When the font in the program is damaged.
    pub fn new() -> Result<Self, InvalidFont> {
        FontRef::try_from_slice(UBUNTU_LIGHT).map(Self)
    }

    /// Writes `words` in black with their upper left corner at `at`, `size_px` high. What does not fit is cut off.
    pub fn write(&self, canvas: &mut RgbImage, words: &str, at: (u32, u32), size_px: f32) {
        let scaled = self.0.as_scaled(PxScale::from(size_px));
        let mut x = at.0 as f32;
        let baseline = at.1 as f32 + scaled.ascent();
        for character in words.chars() {
            let mut glyph = scaled.scaled_glyph(character);
            glyph.position = point(x, baseline);
            x += scaled.h_advance(glyph.id);
            let Some(outline) = self.0.outline_glyph(glyph) else {
                continue; // a space
            };
            let corner = outline.px_bounds().min;
            outline.draw(|dx, dy, coverage| {
                let (px, py) = (
                    corner.x as i64 + i64::from(dx),
                    corner.y as i64 + i64::from(dy),
                );
                let (Ok(px), Ok(py)) = (u32::try_from(px), u32::try_from(py)) else {
                    return;
                };
                if let Some(pixel) = canvas.get_pixel_mut_checked(px, py) {
                    let ink = (coverage.clamp(0.0, 1.0) * 255.0) as u8;
                    pixel.0 = pixel.0.map(|channel| channel.saturating_sub(ink));
                }
            });
        }
    }
}

/// Breaks `words` into lines of at most `columns` characters, between words.
pub fn wrap(words: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in words.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.len() + 1 + word.len() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_words_are_wrapped() {
        assert_eq!(wrap("a large blue star", 8), ["a large", "blue", "star"]);
    }
}
