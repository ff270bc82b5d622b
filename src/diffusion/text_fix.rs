//! Text cleaning as `ftfy.fix_text` does it, which CLIP's tokenizer runs before it splits words.
//!
//! The work is done by `plsfix`, a port of ftfy 6. It deviates in three places that are handled here: it decodes HTML
//! entities even where ftfy leaves them alone (in text with a `<`), its pattern for terminal escapes never matches,
//! and the full-width macron loses its combining half. Control characters are therefore also removed here, after the
//! escapes. What remains different is text that was wrongly decoded as Windows-1257, which plsfix does not know, and
//! some wrongly decoded words in the middle of correct text of another script.

use std::borrow::Cow;
use std::sync::LazyLock;

use plsfix::TextFixerConfig;
use regex::Regex;

/// ftfy repeats until nothing changes; this bounds a text that would change for ever.
const MAX_ROUNDS: usize = 16;

/// Stands behind an `&` that must not start an entity. A control character: every single-byte encoding has it, so it
/// does not disturb the search for wrongly decoded text, and ftfy would remove it anyway.
const SHIELD: char = '\u{1}';

/// `￣` is a space with a macron above, of which plsfix keeps the space.
const FULL_WIDTH_MACRON: char = '\u{ffe3}';

static TERMINAL_ESCAPE: LazyLock<Regex> =
    LazyLock::new(|| Regex::new("\u{1b}\\[[\\d;]*[a-zA-Z]").expect("a constant pattern"));

/// Repair wrongly decoded text, curly quotes, ligatures, full-width letters, HTML entities; remove control
/// characters; normalise to NFC. Line by line.
pub fn fix_text(text: &str) -> String {
    let mut fixed = String::with_capacity(text.len());
    let mut unescape_html = true;
    for line in text.split_inclusive('\n') {
        // A `<` means that this is markup, and that entities are meant; ftfy keeps that up for the lines below.
        unescape_html &= !line.contains('<');
        fixed.push_str(&fix_line(line, unescape_html));
    }
    fixed
}

fn fix_line(line: &str, unescape_html: bool) -> String {
    let config = TextFixerConfig {
        remove_terminal_escapes: false,
        remove_control_chars: false,
        max_decode_length: i32::MAX, // a cut at a byte that is not a character's first would panic
        ..TextFixerConfig::default()
    };
    let mut text = line.replace(FULL_WIDTH_MACRON, " \u{304}");
    for _ in 0..MAX_ROUNDS {
        let fixed = if unescape_html {
            plsfix::fix_and_explain(&text, false, Some(&config)).text
        } else {
            plsfix::fix_and_explain(&shield_entities(&text), false, Some(&config)).text
        };
        let fixed = TERMINAL_ESCAPE.replace_all(&fixed, "");
        let fixed: String = fixed.chars().filter(|&c| !is_control(c)).collect();
        if fixed == text {
            break;
        }
        text = fixed;
    }
    text
}

/// Put a shield behind every ampersand (and what becomes one), so that `&amp;` stays as it is.
fn shield_entities(text: &str) -> Cow<'_, str> {
    if !text.contains(['&', '\u{ff06}']) {
        return Cow::Borrowed(text);
    }
    let mut shielded = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '&' | '\u{ff06}' => shielded.extend(['&', SHIELD]),
            SHIELD => {}
            other => shielded.push(other),
        }
    }
    Cow::Owned(shielded)
}

/// The characters that ftfy removes: controls that are neither white space nor evidence of a wrong encoding.
fn is_control(c: char) -> bool {
    matches!(c,
        '\0'..='\u{8}' | '\u{b}' | '\u{e}'..='\u{1f}' | '\u{7f}'
        | '\u{206a}'..='\u{206f}' // deprecated Arabic forms
        | '\u{feff}' // byte order mark
        | '\u{fff9}'..='\u{fffc}') // interlinear annotation, object replacement
}

#[cfg(test)]
mod tests {
    use super::fix_text;

    /// Inputs and outputs of ftfy 6.3.1.
    #[test]
    fn text_comes_out_as_from_ftfy() {
        for (text, expected) in [
            ("", ""),
            ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
            ("ﬁne ＬＯＵＤ　ＮＯＩＳＥ", "fine LOUD NOISE"),
            ("schÃ¶n", "schön"),
            ("doesnâ€™t", "doesn't"),
            ("&amp; &eacute;", "& é"),
            ("<b> &amp; &lt;", "<b> &amp; &lt;"),
            ("a < b\n&amp;", "a < b\n&amp;"),
            ("&amp;\na < b", "&\na < b"),
            ("\u{1b}[31mred\u{1b}[0m", "red"),
            ("be\u{7}ll \u{feff}x\u{fffc}", "bell x"),
            ("cafe\u{301}", "café"),
            ("（￣ー￣）", "( \u{304}ー \u{304})"),
        ] {
            assert_eq!(fix_text(text), expected, "{text:?}");
        }
    }
}
