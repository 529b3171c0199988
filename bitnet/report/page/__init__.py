"""The report page: every record below some folders as one HTML file that needs no network."""

from bitnet.report.page.render import PAGE, write_page

__all__ = ["PAGE", "write_page"]
