"""The pipeline around ARMT models: conversion, adapters, import of the authors' checkpoints, and the `armt` command."""
