//! Lists: `{"data": […], "next_cursor": …}` with `?limit=` and `?cursor=`, in a stable order.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::codes::Code;
use super::problem::Problem;

pub const DEFAULT_LIMIT: u32 = 50;
pub const MAX_LIMIT: u32 = 200;

/// One page of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Page<T> {
    /// The resources of this page.
    pub data: Vec<T>,
    /// Give it as `?cursor=` to get the next page; absent (`null`) on the last one.
    pub next_cursor: Option<String>,
}

/// The query parameters of a list without filters. Lists with filters repeat the two fields
/// (serde cannot refuse unknown fields through `flatten`) and build this from them.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    /// How many at most.
    #[param(minimum = 1, maximum = 200, default = 50)]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    pub cursor: Option<String>,
}

/// A checked page request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// How many rows to answer with. Read one more to learn whether there is a next page: see [`PageRequest::page`].
    pub limit: usize,
    /// The sort key of the last row of the page before.
    pub after: Option<String>,
}

impl TryFrom<PageQuery> for PageRequest {
    type Error = Problem;

    fn try_from(query: PageQuery) -> Result<Self, Problem> {
        let limit = query.limit.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            let message = format!("found {limit}, expected 1 to {MAX_LIMIT}");
            return Err(Problem::field(
                Code::InvalidQuery,
                "/limit",
                "out_of_range",
                message,
            ));
        }
        let after = query.cursor.as_deref().map(decode_cursor).transpose()?;
        Ok(Self {
            limit: limit as usize,
            after,
        })
    }
}

impl PageRequest {
    /// The number of rows to ask the store for: one more than is answered tells that there is a next page.
    pub fn rows(&self) -> u64 {
        self.limit as u64 + 1
    }

    /// [`PageRequest::after`] of a list in the order of its ids.
    ///
    /// # Errors
    /// 422 when the cursor is another list's.
    pub fn after_id(&self) -> Result<Option<Uuid>, Problem> {
        let id = self.after.as_deref().map(Uuid::parse_str).transpose();
        id.map_err(|_| foreign_cursor())
    }

    /// Makes the page out of up to `limit + 1` rows; `key` is what [`PageRequest::after`] holds for the next page.
    pub fn page<R, T>(
        &self,
        mut rows: Vec<R>,
        key: impl Fn(&R) -> String,
        wire: impl Fn(R) -> T,
    ) -> Page<T> {
        let more = rows.len() > self.limit;
        rows.truncate(self.limit);
        let next_cursor = if more {
            rows.last().map(|row| encode_cursor(&key(row)))
        } else {
            None
        };
        Page {
            data: rows.into_iter().map(wire).collect(),
            next_cursor,
        }
    }
}

/// Cursors are opaque to clients; the version in front allows another content later.
pub fn encode_cursor(key: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("1:{key}"))
}

fn decode_cursor(cursor: &str) -> Result<String, Problem> {
    let bytes = URL_SAFE_NO_PAD
        .decode(cursor)
        .map_err(|_| foreign_cursor())?;
    let text = String::from_utf8(bytes).map_err(|_| foreign_cursor())?;
    text.strip_prefix("1:")
        .map(str::to_owned)
        .ok_or_else(foreign_cursor)
}

fn foreign_cursor() -> Problem {
    Problem::field(
        Code::InvalidCursor,
        "/cursor",
        "invalid_value",
        "expected the `next_cursor` of the page before",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(limit: Option<u32>, cursor: Option<&str>) -> Result<PageRequest, Problem> {
        PageQuery {
            limit,
            cursor: cursor.map(str::to_owned),
        }
        .try_into()
    }

    #[test]
    fn a_cursor_leads_to_the_rest() {
        let first = request(Some(2), None).expect("right").page(
            vec!["a", "b", "c"],
            |row| (*row).to_owned(),
            |row| row,
        );
        assert_eq!(first.data, ["a", "b"]);
        let next = request(Some(2), first.next_cursor.as_deref()).expect("right");
        assert_eq!(next.after.as_deref(), Some("b"));
        let last = next.page(vec!["c"], |row| (*row).to_owned(), |row| row);
        assert_eq!((last.data, last.next_cursor), (vec!["c"], None));
    }

    #[test]
    fn wrong_limits_and_cursors_are_refused() {
        assert_eq!(request(None, None).expect("right").limit, 50);
        for (limit, cursor) in [
            (Some(0), None),
            (Some(201), None),
            (None, Some("?")),
            (None, Some("YWJj")),
        ] {
            let problem = request(limit, cursor).expect_err("wrong");
            assert_eq!(problem.code().status().as_u16(), 422);
        }
    }
}
