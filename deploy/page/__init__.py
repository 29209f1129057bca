"""What every page of a report is made of: pens, a style sheet, macros, sections and tables."""
