"""Installs supermix; every fact comes from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
facts = config["DEFAULT"]

setup(
    name=facts["lib_name"],
    version=facts["version"],
    description=facts["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=facts["author"],
    author_email=facts["author_email"],
    url=facts["git_url"],
    license="Apache-2.0",
    keywords=facts["keywords"],
    python_requires=f">={facts['min_python']}",
    packages=find_packages(include=["supermix", "supermix.*"]),
    package_data={"supermix": ["py.typed", "teachers/*"]},
    install_requires=facts["requirements"].split(),
    extras_require={
        "dev": (facts["dev_requirements"] + " " + facts["book_requirements"]).split(),
        "book": facts["book_requirements"].split(),
        "puzzle": facts["puzzle_requirements"].split(),
        "explore": facts["explore_requirements"].split(),
    },
    entry_points={"console_scripts": facts["console_scripts"].split()},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Education",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
