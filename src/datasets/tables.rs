//! `metadata.jsonl` and `metadata.csv`, as Hugging Face's imagefolder has them: captions by file name, for the files in
//! the folder of the table and below.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::Path;

use serde_json::Value;

use super::captions::{self, CaptionRemark};
use super::layout::Place;
use super::limits::Limits;
use super::report::Remark;

/// What kind of table a file is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    Jsonl,
    Csv,
}

impl TableKind {
    pub fn of(place: &Place) -> Option<Self> {
        match place.file_name.as_str() {
            "metadata.jsonl" => Some(Self::Jsonl),
            "metadata.csv" => Some(Self::Csv),
            _ => None,
        }
    }
}

/// The columns that a caption may be in, by rank.
const CAPTIONS: [&str; 3] = ["text", "caption", "prompt"];
const FILE_NAME: &str = "file_name";
/// Bytes of a line besides its caption.
const MAX_OTHER_BYTES: u64 = 64 << 10;

/// Captions by place, and what is wrong with rows.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Table {
    pub captions: HashMap<Place, String>,
    pub remarks: Vec<Remark>,
}

/// Reads a table that lies in `folders`.
///
/// # Errors
/// Why the table as a whole is left out. Rows that cannot be used are remarked.
pub fn read(
    kind: TableKind,
    path: &Path,
    folders: &[String],
    limits: &Limits,
) -> Result<Table, Remark> {
    let unreadable = |error: io::Error| Remark::new("unreadable", error);
    let file = File::open(path).map_err(unreadable)?;
    let found = file.metadata().map_err(unreadable)?.len();
    if found > limits.table_bytes {
        let message = format!(
            "found {found} bytes, expected at most {}",
            limits.table_bytes
        );
        return Err(Remark::new("too_large", message));
    }
    let mut rows = Rows {
        folders,
        limits,
        table: Table::default(),
        wrong: Vec::new(),
        shortened: 0,
    };
    match kind {
        TableKind::Jsonl => rows.read_jsonl(BufReader::new(file))?,
        TableKind::Csv => rows.read_csv(BufReader::new(file))?,
    }
    Ok(rows.finish())
}

struct Rows<'a> {
    folders: &'a [String],
    limits: &'a Limits,
    table: Table,
    /// Rows that are left out: number and reason.
    wrong: Vec<(usize, String)>,
    /// Captions of several lines.
    shortened: usize,
}

impl Rows<'_> {
    fn read_jsonl(&mut self, mut file: BufReader<File>) -> Result<(), Remark> {
        let most = self.limits.caption_bytes * 6 + MAX_OTHER_BYTES; // a character may be written as `\u0000`
        for number in 1.. {
            let mut line = Vec::new();
            let read = (&mut file).take(most + 1).read_until(b'\n', &mut line);
            if read.map_err(|error| Remark::new("unreadable", error))? == 0 {
                break;
            }
            if line.len() as u64 > most {
                return Err(Remark::new(
                    "too_large",
                    format!("line {number} is longer than {most} bytes"),
                ));
            }
            let text = if number == 1 {
                line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line)
            } else {
                &line
            };
            if text.trim_ascii().is_empty() {
                continue;
            }
            match serde_json::from_slice::<Value>(text) {
                Ok(Value::Object(row)) => {
                    let word = |key: &str| row.get(key).and_then(Value::as_str);
                    let caption = CAPTIONS.iter().find_map(|key| word(key));
                    self.take(number, word(FILE_NAME), caption);
                }
                Ok(_) => self.leave(number, "expected a JSON object"),
                Err(error) => self.leave(number, &error.to_string()),
            }
        }
        Ok(())
    }

    fn read_csv(&mut self, file: BufReader<File>) -> Result<(), Remark> {
        let mut reader = csv::ReaderBuilder::new().flexible(true).from_reader(file);
        let headers = reader
            .byte_headers()
            .map_err(|error| Remark::new("not_a_table", error))?;
        let column = |name: &str| {
            headers.iter().position(|found| {
                let found = found.strip_prefix(b"\xef\xbb\xbf").unwrap_or(found);
                found.trim_ascii() == name.as_bytes()
            })
        };
        let Some(file_name) = column(FILE_NAME) else {
            return Err(Remark::new("not_a_table", "found no column `file_name`"));
        };
        let caption = CAPTIONS.iter().find_map(|name| column(name));
        for (row, record) in reader.byte_records().enumerate() {
            let number = row + 2; // after the headers
            match record {
                Ok(record) => {
                    let word = |at: usize| std::str::from_utf8(record.get(at)?).ok();
                    self.take(number, word(file_name), caption.and_then(word));
                }
                Err(error) => self.leave(number, &error.to_string()),
            }
        }
        Ok(())
    }

    fn take(&mut self, number: usize, file_name: Option<&str>, caption: Option<&str>) {
        let Some(file_name) = file_name else {
            return self.leave(number, "found no `file_name`");
        };
        let Some(caption) = caption else {
            let expected = CAPTIONS.join("`, `");
            return self.leave(number, &format!("found none of `{expected}`"));
        };
        if caption.len() as u64 > self.limits.caption_bytes {
            return self.leave(number, "the caption is too long");
        }
        let place = match Place::parse(file_name) {
            Ok(place) => place.within(self.folders),
            Err(error) => return self.leave(number, &error.to_string()),
        };
        match captions::read(caption.as_bytes()) {
            Ok(read) => {
                self.shortened += usize::from(read.remarks.contains(&CaptionRemark::OnlyFirstLine));
                self.table.captions.insert(place, read.text);
            }
            Err(error) => self.leave(number, &error.to_string()),
        }
    }

    fn leave(&mut self, number: usize, reason: &str) {
        self.wrong.push((number, reason.to_owned()));
    }

    fn finish(mut self) -> Table {
        if let Some((number, reason)) = self.wrong.first() {
            let rows = self.wrong.len();
            let message = format!("{rows} rows are left out; the first is row {number}: {reason}");
            self.table
                .remarks
                .push(Remark::new("rows_left_out", message));
        }
        if self.shortened > 0 {
            let message = format!(
                "{} captions have several lines: the first is used, or with `enable_wildcards` one of them each time",
                self.shortened
            );
            self.table
                .remarks
                .push(Remark::new("only_first_line", message));
        }
        self.table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(kind: TableKind, text: &[u8]) -> Result<Table, Remark> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        read(kind, file.path(), &["train".to_owned()], &Limits::default())
    }

    fn caption<'a>(table: &'a Table, path: &str) -> Option<&'a str> {
        let place = Place::parse(path).expect("a place");
        table.captions.get(&place).map(String::as_str)
    }

    #[test]
    fn captions_are_found_in_both_kinds() {
        let jsonl = "{\"file_name\": \"a.png\", \"text\": \"of a\\nand more\", \"caption\": \"no\"}\n\n\
                     {\"file_name\": \"x/b.png\", \"caption\": \"ein Café\"}\r\n";
        let csv = "\u{feff}file_name,other,text\na.png,1,of a\nx/b.png,2,\"ein Café\"\n";
        for (kind, text) in [(TableKind::Jsonl, jsonl), (TableKind::Csv, csv)] {
            let found = table(kind, text.as_bytes()).expect("a table");
            let lines = match kind {
                TableKind::Jsonl => "of a\nand more",
                TableKind::Csv => "of a",
            };
            assert_eq!(caption(&found, "train/a.png"), Some(lines));
            assert_eq!(caption(&found, "train/x/b.png"), Some("ein Café"));
            let shortened = usize::from(kind == TableKind::Jsonl);
            assert_eq!(found.remarks.len(), shortened, "{:?}", found.remarks);
        }
    }

    #[test]
    fn wrong_rows_are_remarked_and_the_others_kept() {
        let rows =
            b"not json\n[1]\n{\"text\": \"a\"}\n{\"file_name\": \"../a.png\", \"text\": \"a\"}\n\
                     {\"file_name\": \"n.png\"}\n{\"file_name\": \"b.png\", \"text\": \"b\"}";
        let found = table(TableKind::Jsonl, rows).expect("a table");
        assert_eq!(found.captions.len(), 1);
        assert_eq!(found.remarks[0].code, "rows_left_out");
        assert!(found.remarks[0].message.starts_with("5 rows"));
        let refused = table(TableKind::Csv, b"a,b\n1,2\n").expect_err("no table");
        assert_eq!(refused.code, "not_a_table");
        let long = format!("{{\"file_name\": \"{}\"", "x".repeat(2 << 20));
        let refused = table(TableKind::Jsonl, long.as_bytes()).expect_err("too long");
        assert_eq!(refused.code, "too_large");
    }
}
