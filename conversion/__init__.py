"""The pipeline around ARMT models: conversion, adapters, import of the authors' checkpoints, the `armt` command."""
