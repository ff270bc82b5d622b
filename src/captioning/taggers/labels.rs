//! The tags that a network knows, in the order of its outputs: `selected_tags.csv` of the WD taggers, `tags.txt` and its
//! companions of DeepDanbooru.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;

use crate::captioning::CaptionError;

/// The largest list of tags.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// The longest tag.
const MAX_TAG_BYTES: usize = 1000;

/// What a tag is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Category {
    /// What is to be seen.
    General,
    /// Who is to be seen.
    Character,
    /// How harmless it is.
    Rating,
}

impl Category {
    /// The word in rows and on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::General => "general",
            Self::Character => "character",
            Self::Rating => "rating",
        }
    }
}

/// A tag as the network's list has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// With underscores.
    pub name: String,
    /// What it is about.
    pub category: Category,
}

/// A row of `selected_tags.csv`.
#[derive(Deserialize)]
struct Row {
    name: String,
    category: i64,
}

/// Reads `selected_tags.csv`: columns `tag_id`, `name`, `category` (9 rating, 0 general, 4 character), `count`.
///
/// # Errors
/// [`CaptionError::Model`].
pub fn selected_tags(path: &Path) -> Result<Vec<Label>, CaptionError> {
    let text = text_of(path)?;
    let mut reader = csv::ReaderBuilder::new()
        .trim(csv::Trim::Headers)
        .from_reader(text.as_bytes());
    let mut labels = Vec::new();
    for row in reader.deserialize() {
        let row: Row = row.map_err(|error| CaptionError::model(path, error.to_string()))?;
        labels.push(Label {
            name: checked(path, row.name)?,
            category: match row.category {
                9 => Category::Rating,
                4 => Category::Character,
                _ => Category::General,
            },
        });
    }
    Ok(labels)
}

/// Reads the lists of a DeepDanbooru project: every tag in `tags.txt`; which of them are characters in
/// `tags-character.txt` or by `categories.json`, where they are there.
///
/// # Errors
/// [`CaptionError::Model`].
pub fn danbooru_tags(folder: &Path) -> Result<Vec<Label>, CaptionError> {
    let path = folder.join("tags.txt");
    let names = lines(&path)?;
    let characters: HashSet<String> = match folder.join("tags-character.txt") {
        list if list.is_file() => lines(&list)?.into_iter().collect(),
        _ => HashSet::new(),
    };
    let starts = category_starts(&folder.join("categories.json"))?;
    let labels = names.into_iter().enumerate().map(|(index, name)| {
        let by_place = starts.iter().rev().find(|(start, _)| *start <= index);
        let category = if name.starts_with("rating:") {
            Category::Rating
        } else if characters.contains(&name)
            || by_place.is_some_and(|(_, name)| name == "Character")
        {
            Category::Character
        } else {
            Category::General
        };
        Label { name, category }
    });
    Ok(labels.collect())
}

/// Where each category begins in the list of tags, in rising order.
fn category_starts(path: &Path) -> Result<Vec<(usize, String)>, CaptionError> {
    #[derive(Deserialize)]
    struct Start {
        name: String,
        start_index: usize,
    }
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let found: Result<Vec<Start>, _> = serde_json::from_str(&text_of(path)?);
    let found = found.map_err(|error| CaptionError::model(path, error.to_string()))?;
    let mut starts: Vec<(usize, String)> = found
        .into_iter()
        .map(|start| (start.start_index, start.name))
        .collect();
    starts.sort();
    Ok(starts)
}

fn lines(path: &Path) -> Result<Vec<String>, CaptionError> {
    let text = text_of(path)?;
    let names = text.lines().map(str::trim).filter(|line| !line.is_empty());
    names.map(|name| checked(path, name.to_owned())).collect()
}

/// A tag becomes part of a caption: one line of text.
fn checked(path: &Path, name: String) -> Result<String, CaptionError> {
    if name.is_empty() || name.len() > MAX_TAG_BYTES || name.chars().any(char::is_control) {
        let reason = format!(
            "holds a tag of {} bytes that is no line of text",
            name.len()
        );
        return Err(CaptionError::model(path, reason));
    }
    Ok(name)
}

fn text_of(path: &Path) -> Result<String, CaptionError> {
    let failed = |error: std::io::Error| CaptionError::model(path, error.to_string());
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > MAX_FILE_BYTES {
        let reason = format!("has {bytes} bytes, expected at most {MAX_FILE_BYTES}");
        return Err(CaptionError::model(path, reason));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    Ok(text.trim_start_matches('\u{feff}').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label(name: &str, category: Category) -> Label {
        Label {
            name: name.to_owned(),
            category,
        }
    }

    #[test]
    fn a_csv_tells_what_tags_are_about() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("selected_tags.csv");
        let rows = "tag_id,name,category,count\n1,general,9,5\n2,\"a,b\",0,4\n3,rem_(re:zero),4,3\n4,odd,1,2\n";
        std::fs::write(&path, rows).unwrap();
        let expected = [
            label("general", Category::Rating),
            label("a,b", Category::General),
            label("rem_(re:zero)", Category::Character),
            label("odd", Category::General),
        ];
        assert_eq!(selected_tags(&path).unwrap(), expected);
        for broken in [
            "name\nx\n",
            "tag_id,name,category\n1,x,y\n",
            "tag_id,name,category\n1,,0\n",
        ] {
            std::fs::write(&path, broken).unwrap();
            let error = selected_tags(&path).unwrap_err().to_string();
            assert!(error.contains("selected_tags.csv"), "{error}");
        }
    }

    #[test]
    fn a_project_tells_characters_by_list_or_by_place() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("tags.txt", "solo\nsaber\nlumo\nrating:safe\n");
        let read = || danbooru_tags(folder.path()).unwrap();
        let by = |saber, lumo| {
            [
                label("solo", Category::General),
                label("saber", saber),
                label("lumo", lumo),
                label("rating:safe", Category::Rating),
            ]
        };
        assert_eq!(read(), by(Category::General, Category::General));
        write("tags-character.txt", "saber\n");
        assert_eq!(read(), by(Category::Character, Category::General));
        write(
            "categories.json",
            r#"[{"name": "System", "start_index": 3}, {"name": "Character", "start_index": 1}]"#,
        );
        assert_eq!(read(), by(Category::Character, Category::Character));
        write("categories.json", "{}");
        assert!(danbooru_tags(folder.path()).is_err());
    }
}
