//! What the page's template is given: sections made of texts, figures and tables.

use serde::Serialize;

/// The whole page.
#[derive(Serialize)]
pub struct Page {
    /// Version of Lawson.
    pub version: String,
    /// The headline sentence.
    pub sentence: String,
    /// What the headline speaks of.
    pub about: String,
    /// Machine and date in a line.
    pub byline: String,
    /// The style sheet.
    pub css: &'static str,
    /// Everything below the headline.
    pub sections: Vec<Section>,
}

/// A titled part of the page.
#[derive(Serialize)]
pub struct Section {
    /// Anchor.
    pub id: &'static str,
    /// Heading.
    pub title: &'static str,
    /// Whether it is a part of the section above it.
    pub sub: bool,
    /// Its content.
    pub blocks: Vec<Block>,
}

/// One piece of content.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Block {
    /// A paragraph.
    Text {
        /// Its text.
        text: String,
    },
    /// A remark, such as why a section is empty.
    Note {
        /// Its text.
        text: String,
    },
    /// Facts with their names.
    Facts {
        /// Name and value.
        items: Vec<(String, String)>,
    },
    /// Charts side by side where there is room.
    Figures {
        /// The charts.
        items: Vec<Figure>,
    },
    /// A chart with its table beside it.
    Beside {
        /// The chart.
        figure: Figure,
        /// The table.
        table: Table,
    },
    /// A table.
    Table {
        /// The table.
        table: Table,
    },
}

/// A chart with its heading.
#[derive(Serialize)]
pub struct Figure {
    /// What it shows.
    pub title: String,
    /// Of which configuration.
    pub caption: String,
    /// The chart.
    pub svg: String,
}

/// A table.
#[derive(Serialize)]
pub struct Table {
    /// Printed above it.
    pub caption: String,
    /// Column headings; those of number columns are aligned right.
    pub head: Vec<Head>,
    /// Rows, and headings between them.
    pub rows: Vec<Line>,
}

/// A column heading.
#[derive(Serialize)]
pub struct Head {
    /// The heading.
    pub text: &'static str,
    /// Whether the column holds numbers.
    pub num: bool,
}

/// A table row, or a heading across all columns when there are no cells.
#[derive(Default, Serialize)]
pub struct Line {
    /// The heading.
    pub group: String,
    /// Colour class of the series the row belongs to; empty for none.
    pub class: String,
    /// The cells.
    pub cells: Vec<String>,
}

impl Table {
    /// An empty table. A heading that starts with `#` is of a column of numbers.
    pub fn new(caption: &str, head: &[&'static str]) -> Self {
        let head = head
            .iter()
            .map(|text| match text.strip_prefix('#') {
                Some(text) => Head { text, num: true },
                None => Head { text, num: false },
            })
            .collect();
        Table { caption: caption.to_owned(), head, rows: Vec::new() }
    }

    /// Adds a heading across all columns.
    pub fn group(&mut self, name: &str) {
        self.rows.push(Line { group: name.to_owned(), ..Line::default() });
    }

    /// Adds a row in the colour of `class`.
    pub fn row(&mut self, class: &str, cells: Vec<String>) {
        self.rows.push(Line { class: class.to_owned(), cells, ..Line::default() });
    }
}
